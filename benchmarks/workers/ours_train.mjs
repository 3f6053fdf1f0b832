// elastiform's self-distillation: its own training loop, held between steps so that the coordinator can time them.
import fs from 'node:fs';
import path from 'node:path';
import { batchRun } from '../../dist/distill/batches.js';
import { TokenData } from '../../dist/distill/data.js';
import { lossFeeds, resolveLosses } from '../../dist/distill/objectives.js';
import { trainablePlan } from '../../dist/distill/plan.js';
import { capacityFeeds, topLogitsFeeds, trainProgram } from '../../dist/distill/steps.js';
import { Trainable } from '../../dist/distill/trainable.js';
import { resolveConfig, train } from '../../dist/distill/trainer.js';
import { policyOf } from '../../dist/elastic/elastify.js';
import { Checkpoint } from '../../dist/io/safetensors.js';
import { specFromConfig } from '../../dist/model/spec.js';
import { loadWeights } from '../../dist/model/weights.js';
import { Engine, loadAddon } from '../../dist/native/index.js';
import { encode, memory, resetPeak, serve } from '../harness/serve.mjs';
import { generator, tokens } from '../model/random.mjs';

let step;
let trainable;
let settings;
let release; // lets the held training loop go on
let reached; // resolves when the step is done

const batchOf = (ids) => ({
  ids: Int32Array.from(ids),
  positions: Int32Array.from(ids, (_, i) => i),
  targets: new Int32Array(ids.length).fill(-1),
  offsets: Int32Array.of(0, ids.length),
});

function runStep(batch, total, signal) {
  const { dims, feeds } = batchRun(batch);
  return step.run({
    dims,
    feeds: {
      ...feeds,
      ...capacityFeeds(settings.policy, dims.segments, settings.capacity),
      ...settings.teacherFeeds,
      ...lossFeeds(settings.losses, settings.policy, batch, { step: 0, steps: 1, total, capacity: settings.capacity }),
    },
    signal,
  });
}

const TOP_K = 64;

// What a cache of the largest probabilities hands a step, of no model in particular.
function cachedTeacher(rows, vocab) {
  const ids = Int32Array.from({ length: rows * TOP_K }, (_, i) => Math.floor((((i % TOP_K) + 0.5) * vocab) / TOP_K));
  return {
    [topLogitsFeeds.ids]: ids,
    [topLogitsFeeds.logp]: new Float32Array(rows * TOP_K).fill(Math.log(0.9 / TOP_K)),
    [topLogitsFeeds.rest]: new Float32Array(rows).fill(Math.log(0.1)),
  };
}

// Starts the loop of `elastiform distill`; every step waits for `release`.
function startTraining({ spec, engine, rows, lr, scratch }) {
  const documents = Array.from({ length: 64 }, (_, i) => [...tokens(rows, spec.vocab, 100 + i)]);
  const data = TokenData.fromIds(documents, rows, 0);
  const config = resolveConfig(
    {
      steps: 1e6,
      batchTokens: rows,
      evalEvery: 1e6,
      saveEvery: 1e6,
      resume: false,
      optimizer: { lr, weightDecay: 0, schedule: 'constant', warmup: 0 },
    },
    data,
    { batchTokens: rows, lr, weightDecay: 0 },
  );
  let go;
  const hold = () => {
    go = new Promise((resolve) => {
      release = resolve;
    });
  };
  const task = {
    api: 'distill',
    engine,
    trainable,
    data,
    identity: {},
    lossRows: (batch) => batch.ids.length,
    async micro(batch, { total, signal }) {
      await go;
      const { outputs } = await runStep(batch, total, signal);
      return Object.fromEntries(Object.entries(outputs).map(([name, value]) => [name, value[0]]));
    },
  };
  hold();
  train(task, config, scratch, {
    onEvent: (event) => {
      if (event.type !== 'step') return;
      hold();
      reached.resolve(event.loss);
    },
  }).catch((error) => reached?.reject(error));
}

/** Milliseconds for which this thread has run; 0 where /proc does not say. */
function worked() {
  if (process.platform !== 'linux') return 0;
  return Number(fs.readFileSync('/proc/thread-self/schedstat', 'utf8').split(' ')[0]) / 1e6;
}

function oneStep() {
  return new Promise((resolve, reject) => {
    reached = { resolve, reject };
    release();
  });
}

await serve({
  train({ dir, threads, capacity, lr, rows, scratch, gate = 'straight-through', recompute = false, teacher = 'self' }) {
    const configPath = path.join(dir, 'config.json');
    const spec = specFromConfig(JSON.parse(fs.readFileSync(configPath, 'utf8')), configPath);
    loadAddon().setThreads(threads);
    const { weights } = loadWeights(spec, Checkpoint.open(dir), { dtype: 'f32' });
    const engine = new Engine();
    const policy = policyOf(
      { kind: 'elastiformer', tokens: { attn: capacity, mlp: capacity }, keys: 'selected', gate },
      spec,
    );
    trainable = new Trainable(trainablePlan(policy, spec));
    const losses = resolveLosses([{ kind: 'kl', weight: 1 }], spec);
    const teachers = {
      self: () => undefined,
      model: () => ({ spec, weights: loadWeights(spec, Checkpoint.open(dir), { dtype: 'f32' }).weights }),
      cache: () => ({ topK: TOP_K }),
    };
    settings = {
      ...{ policy, capacity: () => capacity, losses },
      teacherFeeds: teacher === 'cache' ? cachedTeacher(rows, spec.vocab) : {},
    };
    const model = { spec, weights, policy, trainable, engine, batchTokens: rows, teacher: teachers[teacher]() };
    step = trainProgram(model, losses, { recompute });
    fs.mkdirSync(scratch, { recursive: true });
    process.on('exit', () => fs.rmSync(scratch, { recursive: true, force: true }));
    startTraining({ spec, engine, rows, lr, scratch });
    const { version, isa } = loadAddon().info();
    return {
      version,
      isa,
      settings: `f32, training loop of distill, KL term only, gates ${gate}, teacher ${teacher}, ${recompute ? 'layers' : 'nothing'} recomputed`,
    };
  },
  // Sets the routers to a fixed pattern; loss and gradients of all weights, then all biases, without an update.
  async gradients({ ids }) {
    const { parameters, size } = trainable.plan;
    const values = new Float32Array(size);
    const routers = parameters.length / 2;
    for (const [index, p] of parameters.entries()) {
      const hidden = parameters[0].size;
      for (let i = 0; i < p.size; i++) {
        const element = index < routers ? i : hidden;
        values[p.offset + i] = 0.02 * Math.sin(element * 0.7 + (index % routers));
      }
    }
    trainable.params.write(values);
    const { outputs } = await runStep(batchOf(ids), ids.length);
    const gradients = encode(trainable.grads.readFloat());
    trainable.grads.write(new Float32Array(size));
    return { loss: outputs.loss[0], gradients };
  },
  async step() {
    const start = performance.now();
    const loss = await oneStep();
    return { ms: performance.now() - start, loss };
  },
  // The longest time between two ticks of a 1 ms timer while steps run, and for how long at most this thread worked
  // between two: the rest of a gap is waiting for a processor.
  async eventLoop({ steps }) {
    const gaps = [];
    const work = [];
    let [last, lastWorked] = [performance.now(), worked()];
    const timer = setInterval(() => {
      const [now, nowWorked] = [performance.now(), worked()];
      gaps.push(now - last);
      work.push(nowWorked - lastWorked);
      [last, lastWorked] = [now, nowWorked];
    }, 1);
    for (let i = 0; i < steps; i++) await oneStep();
    clearInterval(timer);
    gaps.sort((a, b) => a - b);
    return {
      ticks: gaps.length,
      largest: gaps.at(-1),
      p99: gaps[Math.floor(gaps.length * 0.99)],
      work: Math.max(...work),
    };
  },
  // Aborts steps at random moments; milliseconds from abort() until the run's promise has rejected.
  async abort({ ids, trials, within }) {
    const next = generator(11);
    const latencies = [];
    for (let i = 0; i < trials; i++) {
      const controller = new AbortController();
      const run = runStep(batchOf(ids), ids.length, controller.signal).then(
        () => null,
        (error) => {
          if (!controller.signal.aborted) throw error;
          return performance.now();
        },
      );
      await new Promise((resolve) => setTimeout(resolve, (within * next()) / 4294967296));
      const start = performance.now();
      controller.abort();
      const end = await run;
      if (end !== null) latencies.push(end - start);
    }
    return { latencies };
  },
  memory,
  resetPeak,
});
