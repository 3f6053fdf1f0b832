// Modules of encoder-decoder models: which assemblies are drawn, what they lose, and the run: its modules, resuming, bad settings.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it, test } from 'vitest';
import { BadRows, readExamples } from '../../lib/distill/encoder/examples.js';
import { Random } from '../../lib/distill/random.js';
import { encodePairs } from '../../lib/distill/seq2seq/finetune.js';
import { openSeq2Seq } from '../../lib/distill/seq2seq/model.js';
import { drawAssembly } from '../../lib/distill/seq2seq/modular.js';
import type { PairData } from '../../lib/distill/seq2seq/pairs.js';
import { type ModuleLosses, type Replacing, replacing } from '../../lib/distill/seq2seq/replacing.js';
import { type Assembly, assemblyProblem, ladder, type Modules, spansOf } from '../../lib/elastic/modules.js';
import { readElastic } from '../../lib/elastic/store.js';
import { finetune, InvalidArgumentError, type ModularConfig, modular, type TrainEvent } from '../../lib/index.js';
import { sha256File } from '../../lib/io/files.js';
import { Checkpoint } from '../../lib/io/safetensors.js';
import { loadSeq2SeqWeights } from '../../lib/model/seq2seq_weights.js';
import { Engine, loadAddon } from '../../lib/native/index.js';
import { temporaryDirectory } from '../temporary.js';
import { reversals, smallModel, writeLetters } from './pairs.js';

const root = temporaryDirectory();
const base = join(root, 'base');
const data = { kind: 'examples', examples: reversals(600, 1) } as const;
const evalData = { kind: 'examples', examples: reversals(40, 2) } as const;
const common = { device: 'cpu', batchTokens: 512, sequenceLength: 12, seed: 3 } as const;

beforeAll(async () => {
  const tokenizer = writeLetters(join(root, 'letters'));
  const config = { model: smallModel(), tokenizer, data, evalData, steps: 200, evalEvery: 200 };
  await finetune({ ...config, ...common, out: base, optimizer: { lr: 4e-3 } });
});

const sizes = { encoder: { layers: 12 }, decoder: { layers: 6 } };
const modules: Modules = { encoder: spansOf(12, [2, 3, 6]), decoder: spansOf(6, [2, 3, 6]) };

describe('assemblies that are drawn', () => {
  const replace = { start: 0.3, full: 0.5 };
  const draw = (progress: number, count = 200, more = replace): Assembly[] =>
    Array.from({ length: count }, (_, i) =>
      drawAssembly(sizes, modules, { progress, replace: more, random: new Random(7, 'test', i) }),
    );
  const widths = (drawn: readonly Assembly[]) =>
    new Set(
      drawn.flatMap(({ encoder, decoder }) =>
        [...encoder, ...decoder].map((part) => {
          const [first, last = first] = part.split('-').map(Number);
          return last - first + 1;
        }),
      ),
    );

  it('cover every layer once and have a module, whenever', () => {
    for (const progress of [0, 0.1, 0.3, 0.55, 0.99]) {
      for (const assembly of draw(progress)) {
        expect(assemblyProblem(assembly, sizes, modules)).toBeNull();
        expect([...assembly.encoder, ...assembly.decoder].some((part) => part.includes('-'))).toBe(true);
      }
    }
  });

  it('go from fine to coarse, and from layers to modules', () => {
    expect([...widths(draw(0))].sort()).toEqual([1, 2]);
    expect([...widths(draw(0.2))].sort()).toEqual([1, 2, 3]);
    expect([...widths(draw(0.4))].sort()).toEqual([1, 2, 3, 6]);
    const replaced = (drawn: readonly Assembly[]) => {
      const parts = drawn.flatMap(({ decoder }) => decoder);
      return parts.filter((part) => part.includes('-')).length / parts.length;
    };
    const shares = [0, 0.1, 0.3, 0.499].map((progress) => replaced(draw(progress)));
    expect(shares).toEqual(shares.toSorted((a, b) => a - b));
    expect(shares[0]).toBeLessThan(0.35);
    expect(shares[3]).toBeGreaterThan(0.99);
    const whole = draw(0.499).filter(({ encoder }) => encoder.length === 12).length;
    expect(whole).toBeGreaterThan(40);
    expect(whole).toBeLessThan(100);
  });

  it('are in the end those of all paths, with as many parts as may be', () => {
    const late = new Map(draw(0.7, 2000).map((assembly) => [JSON.stringify(assembly), assembly]));
    const whole = [...late.values()]
      .filter(({ encoder }) => encoder.length === 12)
      .map(({ decoder }) => decoder.length);
    expect([...new Set(whole)].sort()).toEqual([1, 2, 3, 4, 5]);
    const [encoders, decoders] = [ladder(12, modules.encoder), ladder(6, modules.decoder)];
    for (const decoder of decoders.slice(1))
      expect([...late.keys()]).toContain(JSON.stringify({ encoder: encoders[0], decoder }));
    for (const encoder of encoders.slice(1))
      expect([...late.keys()]).toContain(JSON.stringify({ encoder, decoder: decoders.at(-1) }));
  });

  it('are of modules where nothing would be replaced yet', () => {
    const drawn = draw(0, 50, { start: 0, full: 0.5 });
    expect([...widths(drawn)]).toEqual([2]);
  });
});

const losses: Required<ModuleLosses> = { task: 1, logits: 0.7, hidden: 0.5, attention: 0.3 };
async function opened<T>(
  of: (layers: number) => Modules,
  use: (student: Replacing, pairs: PairData) => Promise<T>,
): Promise<T> {
  const model = await openSeq2Seq('modular', { from: base }, 0);
  const bad = new BadRows('modular', false);
  const { data: pairs } = await encodePairs(
    'modular',
    common,
    { train: await readExamples(evalData, bad), heldOut: null },
    model,
    bad,
  );
  using engine = new Engine('cpu');
  using checkpoint = Checkpoint.open(base);
  using loaded = loadSeq2SeqWeights(model.spec, checkpoint);
  const options = { engine, batchTokens: 512 };
  const { spec } = model;
  using student = await replacing(spec, checkpoint, loaded.weights, of(4), pairs, losses, options);
  return await use(student, pairs);
}

describe('an assembly', () => {
  const granular = (layers: number): Modules => ({ encoder: spansOf(layers, [2]), decoder: spansOf(layers, [2, 4]) });

  it('of copies of all layers loses nothing to the whole model', () =>
    opened(
      (layers) => ({ encoder: spansOf(layers, [1]), decoder: spansOf(layers, [1]) }),
      async (student, pairs) => {
        const copies = { encoder: ['0', '1', '2', '3'], decoder: ['0', '1', '2', '3'] };
        const { batch } = pairs.next({ epoch: 0, segment: 0 }, 512, null);
        const terms = await student.run(copies, batch, { weight: 1 / batch.target.targets.length });
        expect(terms).toMatchObject({ logits: 0, hidden: 0, attention: 0 });
        expect(terms.loss).toBe(terms.task);
        const quality = await student.quality(copies, pairs);
        expect(quality.divergence).toBe(0);
        expect(quality.loss).toBeGreaterThan(0.1);
      },
    ));

  it('has the gradients that its loss has, in its modules alone', () =>
    opened(granular, async (student, pairs) => {
      const assembly = { encoder: ['0-1', '2', '3'], decoder: ['0-1', '2', '3'] };
      const { batch } = pairs.next({ epoch: 0, segment: 0 }, 128, null);
      const at = { weight: 1 / batch.target.targets.length };
      const terms = await student.run(assembly, batch, at);
      for (const name of ['task', 'logits', 'hidden', 'attention'] as const)
        expect(terms[name], name).toBeGreaterThan(0);
      const sum = terms.task + 0.7 * terms.logits + 0.5 * terms.hidden + 0.3 * terms.attention;
      expect(terms.loss).toBeCloseTo(sum, 5);
      const { trainable } = student;
      const gradients = trainable.grads.readFloat();
      const values = trainable.params.readFloat();
      const random = new Random(1, 'direction');
      for (const { name, offset, size } of trainable.plan.parameters) {
        const own = gradients.subarray(offset, offset + size);
        const learns = /^(encoder|decoder)\.modules\.0-1\./.test(name);
        expect(
          own.some((x) => x !== 0),
          name,
        ).toBe(learns);
      }
      // Along random directions of each module's weights, by central differences.
      for (const prefix of ['encoder.modules.0-1.', 'decoder.modules.0-1.']) {
        const direction = new Float32Array(values.length);
        for (const { name, offset, size } of trainable.plan.parameters) {
          if (!name.startsWith(prefix)) continue;
          for (let i = offset; i < offset + size; i++) direction[i] = random.normal();
        }
        const lossAt = async (step: number) => {
          trainable.params.write(values.map((x, i) => x + step * direction[i]));
          return (await student.run(assembly, batch, at)).loss;
        };
        const step = 2e-4;
        const measured = ((await lossAt(step)) - (await lossAt(-step))) / (2 * step);
        const expected = gradients.reduce((total, g, i) => total + g * direction[i], 0);
        expect(Math.abs(measured - expected) / Math.abs(expected), prefix).toBeLessThan(0.03);
      }
    }));
});

const tiny = (name: string, more: Partial<ModularConfig> = {}): ModularConfig => ({
  ...common,
  ...{ from: base, out: join(root, name), data, evalData, granularities: [2, 4], steps: 120, evalEvery: 60 },
  optimizer: { lr: 3e-3 },
  ...more,
});

test('modules learn to replace layers, the model stays as it is, and what is written is what was measured', async () => {
  const events: TrainEvent[] = [];
  const result = await modular(tiny('learned', { onEvent: (event) => void events.push(event) }));
  expect(result).toMatchObject({
    ...{ stopped: 'done', step: 120, badRows: 0, truncated: 0, examples: { train: 600, heldOut: 40 } },
    modules: { encoder: spansOf(4, [2, 4]), decoder: spansOf(4, [2, 4]) },
  });
  const evals = events.flatMap((event) => (event.type === 'eval' ? [Object.values(event.levels)] : []));
  expect(evals).toHaveLength(3);
  for (const [i, { divergence }] of evals[2].entries()) expect(divergence).toBeLessThan(0.6 * evals[0][i].divergence);
  const [whole, ...smaller] = result.assemblies!;
  expect(whole.assembly).toEqual({ encoder: ['0', '1', '2', '3'], decoder: ['0', '1', '2', '3'] });
  expect(whole.divergence).toBe(0);
  expect(smaller.length).toBeGreaterThan(3);
  expect(smaller.at(-1)!.assembly).toEqual({ encoder: ['0-3'], decoder: ['0-3'] });
  expect(smaller[0].divergence).toBeLessThan(smaller.at(-1)!.divergence);
  const hash = (dir: string) => sha256File(join(dir, 'model.safetensors'));
  expect(await hash(result.dir)).toBe(await hash(base));
  expect((await readElastic(result.dir))!.policy.modules).toEqual(result.modules);
  expect(readFileSync(join(result.dir, 'metrics.jsonl'), 'utf8')).toContain('"attention":');
});

test('stopped and started again, on another number of threads, it ends at the same bits', async () => {
  const config = tiny('once', { steps: 8, evalEvery: 4, saveEvery: 3, gradAccumulation: 2, gradCheckpointing: true });
  await modular(config);
  const out = join(root, 'twice');
  const controller = new AbortController();
  const addon = loadAddon();
  addon.setThreads(1);
  try {
    const stopped = await modular({
      ...config,
      out,
      signal: controller.signal,
      onEvent: (event) => void (event.type === 'step' && event.step === 4 && controller.abort()),
    });
    expect(stopped).toMatchObject({ stopped: 'signal', step: 4 });
    expect(stopped).not.toHaveProperty('assemblies');
    addon.setThreads(3);
    expect(await modular({ ...config, out })).toMatchObject({ stopped: 'done', step: 8 });
  } finally {
    addon.setThreads(2);
  }
  const hash = (dir: string) => sha256File(join(dir, 'elastic_router.safetensors'));
  expect(await hash(out)).toBe(await hash(config.out));
  await expect(modular({ ...config, out, granularities: [2] })).rejects.toThrow('was made with granularities');
});

test.each([
  ['no granularities', { granularities: [] }, 'granularities must be different integers above 1, got []'],
  ['one that does not fit', { granularities: [3] }, 'that divide 4 encoder or 4 decoder layers, got 3'],
  ['layers themselves', { granularities: [1] }, 'integers above 1 that divide'],
  ['a rate above 1', { replace: { start: 2 } }, 'replace.start must be a number from 0 to 1, got 2'],
  ['an unknown rate', { replace: { end: 1 } }, "unknown key of replace 'end'; it takes start, full"],
  ['a negative loss', { losses: { hidden: -1 } }, 'losses.hidden must be a number of zero or more, got -1'],
  ['no loss', { losses: { task: 0, logits: 0, hidden: 0, attention: 0 } }, 'something to learn'],
  ['no model', { from: '' }, 'from must be the path of a directory'],
  ['two held-out parts', { heldOut: 0.1 }, 'give evalData or heldOut, not both'],
] as [string, Partial<ModularConfig>, string][])('refuses %s', async (_, more, message) => {
  const attempt = modular(tiny('refused', more));
  await expect(attempt).rejects.toThrow(InvalidArgumentError);
  await expect(attempt).rejects.toThrow(message);
});

test('does not start from a model that has modules', async () => {
  const { dir } = await modular(tiny('first', { steps: 1 }));
  await expect(modular(tiny('second', { from: dir }))).rejects.toThrow('start from its base');
  await expect(finetune({ ...common, from: dir, data, steps: 1, out: join(root, 'third') })).rejects.toThrow(
    'start from its base',
  );
});
