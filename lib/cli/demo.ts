// `elastiform demo`: makes a model elastic, measures it against baselines and writes a report, in about two minutes.
import { existsSync } from 'node:fs';
import { copyFile, mkdir, mkdtemp, readdir, rename, rm, writeFile } from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { splitHeldOut } from '../distill/data.js';
import { distill } from '../distill/distill.js';
import { elastify } from '../elastic/elastify.js';
import { type EvalLevel, type EvalReport, evaluate } from '../infer/evaluate.js';
import { type ElasticModel, loadModel } from '../infer/model.js';
import { median } from '../infer/statistics.js';
import { FileSystemError } from '../io/files.js';
import { InvalidArgumentError } from '../native/errors.js';
import { loadAddon } from '../native/index.js';
import {
  type LevelResult,
  levelsCsv,
  qualityChart,
  type ReportData,
  reportHtml,
  type Sample,
} from '../report/index.js';
import { type Command, type CommandContext, exitCodes } from './command.js';
import { documentsOf, readTexts } from './data.js';
import { machineLine } from './doctor.js';
import { levelTable } from './eval.js';
import { Progress } from './progress.js';
import { loadFlags, percent } from './shared.js';
import { trainingReporter } from './training.js';

const shippedModel = resolve(dirname(fileURLToPath(import.meta.url)), '../../models/tiny');
const budgets = [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4];
const defaultSeconds = 75;
const probeSteps = 4;
const evaluatedTokens = 8192;
const seed = 1;

export const demo: Command = {
  name: 'demo',
  summary: 'Make a small model elastic, compare it with baselines at equal compute and write a report.',
  positionals: '',
  flags: {
    model: { type: 'string', value: 'DIR', help: 'model to make elastic (default: the one in the package)' },
    data: {
      type: 'string',
      value: 'FILE,...',
      help: 'text to train and evaluate on (default: the text beside the model)',
    },
    field: { type: 'string', value: 'NAME', help: 'field of .jsonl lines that holds the text (default: text)' },
    out: { type: 'string', short: 'o', value: 'DIR', help: 'directory to write (default: demo-out)' },
    seconds: { type: 'string', value: 'N', help: `time for training (default: ${defaultSeconds})` },
    threads: loadFlags.threads,
  },
  example: 'elastiform demo --model models/mine --data book.txt --seconds 60',
  async run(context) {
    const { flags, json, printJson, signal } = context;
    const dir = flags.string('model') ?? shippedModel;
    const out = resolve(flags.string('out') ?? 'demo-out');
    const seconds = flags.number('seconds', { min: 1 }) ?? defaultSeconds;
    const threads = flags.integer('threads', { min: 1 });
    if (threads !== undefined) loadAddon().setThreads(threads);
    const texts = await demoTexts(context, dir);
    await checkReplaceable(out);
    await mkdir(dirname(out), { recursive: true });
    const work = await mkdtemp(`${out}.partial-`);
    try {
      const report = await runDemo(context, { dir, work, seconds, texts });
      await moveInto(work, out);
      if (json) printJson(report);
      else
        context.print(
          `\nReport: ${join(out, 'report.html')}\nTry: npx elastiform generate ${join(out, 'model')} --budget 0.6\n`,
        );
    } finally {
      await rm(work, { recursive: true, force: true });
    }
    return signal.aborted ? exitCodes.interrupted : exitCodes.ok;
  },
};

interface Texts {
  name: string;
  train: string[];
  heldOut: string[];
}

async function demoTexts(context: CommandContext, dir: string): Promise<Texts> {
  const given = await documentsOf(context, 'data');
  if (given) {
    const name = context.flags
      .list('data')!
      .map((file) => basename(file))
      .join(', ');
    return { name, ...splitHeldOut(given, 0.15, seed) };
  }
  const files = ['train.txt', 'heldout.txt'].map((name) => join(dir, name));
  const missing = files.find((file) => !existsSync(file));
  if (missing) {
    const advice = existsSync(dir) ? 'give --data FILE' : 'give --model DIR';
    throw new InvalidArgumentError(`[demo] ${missing} does not exist; ${advice}`);
  }
  return { name: 'heldout.txt', train: await readTexts([files[0]]), heldOut: await readTexts([files[1]]) };
}

interface Setting {
  dir: string;
  /** Directory that becomes the output. */
  work: string;
  seconds: number;
  texts: Texts;
}

async function runDemo(context: CommandContext, { dir, work, seconds, texts }: Setting): Promise<ReportData> {
  const say = (line: string): void => {
    if (!context.json) context.print(`${line}\n`);
  };
  const started = performance.now();
  say(`Machine: ${machineLine()}`);

  const planDir = join(work, 'plan');
  const modelDir = join(work, 'model');
  const plan = await elastify(dir, { kind: 'elastiformer' }, { out: planDir });
  say(
    `Routers: ${plan.trainableParameters} parameters attached, ${percent(plan.trainableShare, 3)} of ${basename(resolve(dir))}`,
  );

  const training = await train(context, planDir, modelDir, texts.train, seconds);
  say(
    `Trained: ${training.steps} steps in ${training.seconds.toFixed(0)} s, ${Math.round(training.tokensPerSecond)} tokens/s`,
  );
  await copyFile(join(modelDir, 'metrics.jsonl'), join(work, 'metrics.jsonl'));
  for (const name of ['checkpoints', 'metrics.jsonl']) await rm(join(modelDir, name), { recursive: true, force: true });
  await rm(planDir, { recursive: true });

  await using model = await loadModel(modelDir, { signal: context.signal });
  const progress = new Progress('evaluate');
  const evaluation = await evaluate(model, {
    data: texts.heldOut,
    calibration: texts.train,
    budgets,
    baselines: ['random', 'drop'],
    sequenceLength: Math.min(256, model.network.maxContext),
    limit: evaluatedTokens,
    seed,
    signal: context.signal,
    onProgress: ({ phase, done, total }) => progress.update({ done, total, facts: [phase] }),
  }).finally(() => progress.finish());
  say(`\n${levelTable(evaluation.levels)}`);
  for (const line of advantages(evaluation)) say(line);

  const samples = await generateSamples(model, texts.heldOut[0], context);
  for (const sample of samples)
    say(`\n${sample.label}, ${percent(sample.ratio)} of the FLOPs:\n${sample.prompt}${sample.text}`);

  const { info } = model;
  const report: ReportData = {
    title: `${basename(resolve(dir))}, made elastic`,
    version: loadAddon().info().version,
    created: new Date().toISOString(),
    machine: machineLine(),
    model: {
      name: basename(resolve(dir)),
      architecture: info.architecture,
      parameters: info.parameters,
      layers: info.layers,
      hidden: info.hidden,
    },
    elastic: {
      trainable: plan.trainableParameters,
      share: plan.trainableShare,
      places: 'one token router for attention and one for the FFN of every layer',
    },
    training,
    evaluation: {
      data: texts.name,
      tokens: evaluation.tokens,
      sequences: evaluation.sequences,
      levels: evaluation.levels.map(levelResult),
    },
    samples,
    notes: notes(evaluation),
    seconds: (performance.now() - started) / 1000,
  };
  await writeFile(join(work, 'report.json'), `${JSON.stringify(report, null, 2)}\n`);
  await writeFile(join(work, 'report.html'), reportHtml(report));
  await writeFile(join(work, 'chart.svg'), qualityChart(report));
  await writeFile(join(work, 'levels.csv'), levelsCsv(report.evaluation.levels));
  return report;
}

/** Trains for about `seconds`: a few steps tell how long one takes, so that the schedule ends when the time does. */
async function train(
  context: CommandContext,
  plan: string,
  out: string,
  documents: readonly string[],
  seconds: number,
): Promise<ReportData['training']> {
  const common = {
    plan,
    data: { kind: 'documents', documents } as const,
    batchTokens: 1024,
    sequenceLength: 256,
    seed,
    resume: false,
    signal: context.signal,
  } as const;
  const probe = `${out}-probe`;
  let rate = 0;
  const enough = new AbortController();
  await distill({
    ...common,
    out: probe,
    steps: probeSteps + 1,
    signal: AbortSignal.any([context.signal, enough.signal]),
    onEvent: (event) => {
      if (event.type !== 'step') return;
      rate = Math.max(rate, event.tokensPerSecond);
      // Stopped, not finished: it is not calibrated.
      if (event.step === probeSteps) enough.abort();
    },
  });
  await rm(probe, { recursive: true, force: true });
  context.signal.throwIfAborted();
  const steps = Math.max(20, Math.round((seconds * rate) / common.batchTokens));

  const reporter = trainingReporter('distill');
  let started = performance.now();
  let ended = started;
  const points: { step: number; loss: number }[] = [];
  const rates: number[] = [];
  const result = await distill({
    ...common,
    out,
    steps,
    saveEvery: steps,
    onEvent: (event) => {
      reporter.event(event);
      if (event.type === 'measure' && event.what === 'sensitivity') started = performance.now();
      if (event.type !== 'step') return undefined;
      ended = performance.now();
      points.push({ step: event.step, loss: event.loss });
      rates.push(event.tokensPerSecond);
      // A machine that became slower must not take for ever.
      return ended - started > seconds * 1500 ? 'stop' : undefined;
    },
  }).finally(() => reporter.finish());
  if (result.stopped === 'signal') context.signal.throwIfAborted();
  const took = (ended - started) / 1000;
  return { steps: result.step, seconds: took, tokensPerSecond: median(rates), points };
}

async function generateSamples(model: ElasticModel, text: string, { signal }: CommandContext): Promise<Sample[]> {
  const prompt = text
    .trimStart()
    .split(/(?<=\s)/)
    .slice(0, 8)
    .join('')
    .trimEnd();
  const samples: Sample[] = [];
  for (const [label, budget] of [
    ['Full budget', 'full'],
    ['Half budget', 0.5],
  ] as const) {
    const stream = model.generate(prompt, { budget, maxTokens: 100, temperature: 0.7, seed, signal });
    const { compute } = await stream.usage;
    samples.push({
      label,
      prompt,
      text: await stream.text,
      ratio: compute.ratio,
      tokensPerSecond: compute.tokensPerSecond ?? 0,
    });
  }
  return samples;
}

function levelResult(level: EvalLevel): LevelResult {
  return {
    method: level.method === 'full' ? 'routed' : level.method,
    budget: level.budget as number,
    ratio: level.ratio,
    share: level.share,
    perplexity: level.perplexity,
    bitsPerByte: level.bitsPerByte,
    kl: level.kl,
    agreement: level.agreement,
    tokensPerSecond: level.tokensPerSecond,
    layers: { attn: [...level.layersRun.attn], mlp: [...level.layersRun.mlp] },
  };
}

function advantages({ levels }: EvalReport): string[] {
  return levels
    .filter((l) => l.budget === 0.7 && l.routedAdvantage)
    .map(({ method, routedAdvantage }) => {
      const { kl, agreement } = routedAdvantage!;
      const points = (x: number): string => (x * 100).toFixed(1);
      return `Learned routing against ${method} at 0.7: agreement ${points(agreement.value)} points higher [${points(agreement.low)}, ${points(agreement.high)}], KL ${kl.value.toFixed(3)} lower [${kl.low.toFixed(3)}, ${kl.high.toFixed(3)}]`;
    });
}

function notes({ sequenceLength }: EvalReport): string[] {
  return [
    'FLOPs are counted by the kernels from the rows they really ran, routers included; the loss of the evaluation is not counted.',
    'The elastic model chooses tokens causally, by thresholds calibrated on training text, as generation does; the share it achieves on other text may differ a little from the share asked for.',
    'The random baseline gets the same share of tokens in every sub-layer, chosen afresh for every batch: it shows what the choice of tokens is worth. The dropping baseline leaves out whole sub-layers, in the order that hurts least on training text; of the two such models around the compute in question each gets a share of the sequences, so that the mean is the same. Neither is trained.',
    `Speed is the median of repeated prefills of packed sequences of ${sequenceLength} tokens on the machine named above.`,
    'Intervals are 95 %, from a bootstrap over sequences. The generated text was drawn with a fixed seed, not chosen.',
  ];
}

async function checkReplaceable(out: string): Promise<void> {
  if (!existsSync(out)) return;
  const names = await readdir(out).catch((cause) => {
    throw new FileSystemError(`[demo] ${out} is not a directory that can be read`, cause);
  });
  if (names.length > 0 && !names.includes('report.json')) {
    throw new FileSystemError(`[demo] ${out} exists and holds no demo report; choose another directory with --out`);
  }
}

/** Replaces `out` by `work` as a whole. */
async function moveInto(work: string, out: string): Promise<void> {
  const aside = `${work}.old`;
  try {
    if (existsSync(out)) await rename(out, aside);
    await rename(work, out);
  } catch (cause) {
    if (existsSync(aside) && !existsSync(out)) await rename(aside, out);
    throw new FileSystemError(`[demo] cannot write ${out}: ${(cause as Error).message}`, cause);
  } finally {
    await rm(aside, { recursive: true, force: true });
  }
}
