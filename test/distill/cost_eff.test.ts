// COST-EFF: gradients in equilibrium, importance, what is kept, and the pipeline: its models, its report, resuming, bad settings.
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { BadRows, ExampleData, readExamples } from '../../lib/distill/encoder/examples.js';
import { type ExitedEncoder, exitedSlots, exitProgram, withExits } from '../../lib/distill/encoder/exits.js';
import { importanceOf, keptParts, sizesAfter } from '../../lib/distill/encoder/importance.js';
import { readElastic } from '../../lib/elastic/store.js';
import {
  type CostEffConfig,
  costEff,
  finetune,
  InvalidDataError,
  loadModel,
  type TrainEvent,
} from '../../lib/index.js';
import { sha256File } from '../../lib/io/files.js';
import { loadTokenizer } from '../../lib/io/tokenizer.js';
import { encoderSpecFromConfig } from '../../lib/model/encoder_spec.js';
import { encoderSlots } from '../../lib/model/encoder_weights.js';
import { planOf } from '../../lib/model/weights.js';
import { Engine } from '../../lib/native/index.js';
import { encoderDirectory } from '../model/golden.js';
import { temporaryDirectory } from '../temporary.js';

const root = temporaryDirectory();
const words = ['walks', 'saw', 'lake', 'owner', 'barks', 'seldom'];
const animals = (count: number, first = 0) =>
  Array.from({ length: count }, (_, i) => {
    const n = first + i;
    return {
      text: `${words[n % 6]} the ${n % 3 === 0 ? 'dog' : 'cat'} ${words[(n * 5 + 1) % 6]}`,
      label: n % 3 === 0 ? 'woof' : 'meow',
    };
  });

const model = {
  ...{ model_type: 'bert', hidden_size: 16, intermediate_size: 24, num_hidden_layers: 4, num_attention_heads: 4 },
  ...{ max_position_embeddings: 24, vocab_size: 90, architectures: ['BertForSequenceClassification'] },
  ...{ id2label: { 0: 'meow', 1: 'woof' }, layer_norm_eps: 1e-5 },
};

/** Random, with numbers large enough for differences to be seen. */
function randomExited(): ExitedEncoder {
  const spec = encoderSpecFromConfig(model, 'config.json');
  const plan = planOf(encoderSlots(spec));
  const weights = new Float32Array(plan.size);
  for (const { name, offset, size } of plan.parameters)
    for (let i = 0; i < size; i++)
      weights[offset + i] =
        0.3 * Math.sin(offset + 7.3 * i) + (name.endsWith('orm.weight') || /norm\d\.weight/.test(name) ? 1 : 0);
  const plain = withExits({ spec, config: JSON.stringify(model), weights }, 1);
  return {
    ...plain,
    weights: new Map([...plain.weights].map(([k, v]) => [k, k.startsWith('exits') ? v.map((x) => x * 20) : v])),
  };
}

async function exampleData(): Promise<ExampleData> {
  const bad = new BadRows('test', false);
  const rows = await readExamples({ kind: 'examples', examples: animals(5) }, bad);
  return ExampleData.encode(
    rows,
    await loadTokenizer(encoderDirectory('bert')),
    24,
    { kind: 'classes', labels: ['meow', 'woof'] },
    bad,
  );
}

describe('gradients', () => {
  const student = randomExited();
  const losses = { hidden: 0, soft: 0.5, hard: 0.5, teacher: 'matching', exits: 'all' } as const;

  it('of exits are in equilibrium: in each layer those of the sum of losses, divided by the exits from there on', async () => {
    using engine = new Engine();
    const data = await exampleData();
    const { batch } = data.next({ epoch: 0, segment: 0 }, 64, null);
    // Another model: one of its own exits would give a soft loss of 0.
    const teacher = withExits(
      {
        spec: student.spec,
        config: student.config,
        weights: Float32Array.from(planWeights(student).map((x) => x * 0.7)),
      },
      5,
    );
    const run = async (model: ExitedEncoder) => {
      using program = exitProgram(model, teacher, data, losses, () => true, { engine, batchTokens: 64 });
      const { loss } = await program.run(batch, { weight: 1 / 5, rows: 'text' });
      const grads = program.trainable.grads.readFloat();
      return {
        loss,
        grads: new Map(
          program.trainable.plan.parameters.map((p) => [p.name, grads.slice(p.offset, p.offset + p.size)]),
        ),
      };
    };
    const { grads } = await run(student);
    // The derivative of the sum of all losses along each tensor's gradient, by differences.
    const names = [
      'layers.0.up.weight',
      'layers.1.q.bias',
      'layers.2.norm2.weight',
      'layers.3.o.weight',
      'exits.1.weight',
      'head.out.bias',
    ];
    for (const name of names) {
      const gradient = grads.get(name)!;
      const length = Math.hypot(...gradient);
      expect(length).toBeGreaterThan(1e-5);
      const moved = async (step: number) => {
        const values = student.weights.get(name)!.map((x, i) => x + (step * gradient[i]) / length);
        return (await run({ ...student, weights: new Map([...student.weights, [name, values]]) })).loss;
      };
      const step = 2e-2;
      const slope = ((await moved(step)) - (await moved(-step))) / (2 * step);
      const layer = /^layers\.(\d)/.exec(name)?.[1];
      const exits = layer === undefined ? 1 : student.spec.layers - Number(layer);
      expect(slope / (length * exits), name).toBeGreaterThan(0.98);
      expect(slope / (length * exits), name).toBeLessThan(1.02);
    }
  });

  it('of the classifier alone are those of its loss', async () => {
    using engine = new Engine();
    const data = await exampleData();
    const { batch } = data.next({ epoch: 0, segment: 0 }, 64, null);
    const only = { ...losses, soft: 0, hard: 1, exits: 'classifier' } as const;
    using program = exitProgram(student, student, data, only, () => true, { engine, batchTokens: 64 });
    await program.run(batch, { weight: 1 / 5, rows: 'text' });
    const grads = program.trainable.grads.readFloat();
    const of = (name: string) => {
      const { offset, size } = program.trainable.plan.parameters.find((p) => p.name === name)!;
      return Math.hypot(...grads.slice(offset, offset + size));
    };
    expect(of('exits.1.weight')).toBe(0);
    expect(of('layers.0.up.weight')).toBeGreaterThan(1e-5);
  });

  it('of hidden states are 0 where student and teacher are one, and then the loss is, too', async () => {
    using engine = new Engine();
    const data = await exampleData();
    const { batch } = data.next({ epoch: 0, segment: 0 }, 64, null);
    const only = { ...losses, soft: 0, hard: 0, hidden: 1 } as const;
    using program = exitProgram(student, student, data, only, () => true, { engine, batchTokens: 64 });
    expect(await program.run(batch, { weight: 1 / 5, rows: 'text' })).toMatchObject({ loss: 0, hidden: 0 });
    expect(program.trainable.grads.readFloat().every((x) => x === 0)).toBe(true);
  });
});

const planWeights = ({ spec, weights }: ExitedEncoder): Float32Array => {
  const plan = planOf(encoderSlots(spec));
  const flat = new Float32Array(plan.size);
  for (const { name, offset } of plan.parameters) flat.set(weights.get(name)!, offset);
  return flat;
};

describe('importance', () => {
  it('is |A w| summed over the columns of a head, and over the row and the column of a unit', () => {
    const student = randomExited();
    const sums = new Map([...student.weights].map(([name, w]) => [name, w.map((_, i) => Math.abs(Math.cos(i)))]));
    const { heads, units } = importanceOf(student, sums);
    const at = (name: string, index: number) => Math.abs(student.weights.get(name)![index] * sums.get(name)![index]);
    // Head 2 of layer 1 has columns 8 to 11 of [16, 16]; unit 5 row 5 of [24, 16] and column 5 of [16, 24].
    let [head, unit] = [0, 0];
    for (let d = 0; d < 16; d++) {
      for (let c = 8; c < 12; c++) head += at('layers.1.o.weight', d * 16 + c);
      unit += at('layers.1.up.weight', 5 * 16 + d) + at('layers.1.down.weight', d * 24 + 5);
    }
    expect(heads[1][2]).toBeCloseTo(head, 5);
    expect(units[1][5]).toBeCloseTo(unit, 5);
    expect(heads.map(({ length }) => length)).toEqual([4, 4, 4, 4]);
  });

  const scores = {
    heads: [Float64Array.of(1, 5, 3), Float64Array.of(9, 8, 7)],
    units: [Float64Array.of(2, 2, 1, 0), Float64Array.of(1, 1, 1, 4)],
  };
  it('keeps the best of every layer, or of all layers but at least one in each', () => {
    expect(keptParts(scores, { heads: 2, ffn: 2 }, 'uniform')).toEqual({
      heads: [
        [1, 2],
        [0, 1],
      ],
      units: [
        [0, 1],
        [0, 3],
      ],
    });
    expect(keptParts(scores, { heads: 2, ffn: 2 }, 'importance')).toEqual({
      heads: [[1], [0, 1, 2]],
      units: [[0, 1, 2], [3]],
    });
    expect(keptParts(scores, { heads: 3, ffn: 4 }, 'importance').heads).toEqual([
      [0, 1, 2],
      [0, 1, 2],
    ]);
  });
  it('goes to the target in straight lines, a head per event', () => {
    const spec = encoderSpecFromConfig(model, 'config.json');
    const target = { heads: 1, ffn: 6, rank: 4 };
    expect([1, 2, 3].map((event) => sizesAfter(spec, target, event, 3))).toEqual([
      { heads: 3, ffn: 18, rank: 12 },
      { heads: 2, ffn: 12, rank: 8 },
      { heads: 1, ffn: 6, rank: 4 },
    ]);
  });
});

describe('pipeline', () => {
  const base = join(root, 'base');
  const heldOut = animals(30, 500);
  const config = (name: string, more: Partial<CostEffConfig> = {}): CostEffConfig => ({
    from: base,
    out: join(root, name),
    data: { kind: 'examples', examples: animals(96) },
    evalData: { kind: 'examples', examples: heldOut },
    target: { heads: 2, ffn: 12, rank: 8 },
    ...{ device: 'cpu', batchTokens: 256, sequenceLength: 24, seed: 1 },
    ...{ assistant: { epochs: 20, lr: 3e-3 }, slim: { epochs: 8, lr: 3e-3 }, hidden: { epochs: 6, lr: 3e-3 } },
    prediction: { epochs: 10, lr: 3e-3 },
    ...more,
  });
  beforeAll(async () => {
    const { architectures, id2label, ...scratch } = model;
    const result = await finetune({
      ...{ model: scratch, tokenizer: encoderDirectory('bert'), out: base, device: 'cpu', seed: 2 },
      data: { kind: 'examples', examples: animals(96) },
      evalData: { kind: 'examples', examples: heldOut },
      ...{ epochs: 40, batchTokens: 256, sequenceLength: 24, optimizer: { lr: 1e-2 } },
    });
    expect(result.best!.metric).toBe(1);
  });

  it('makes an assistant and a slim model, whose quality and size are as reported', async () => {
    const stages: string[] = [];
    const onEvent = (event: TrainEvent) =>
      void (event.type === 'stage' && stages.push(`${event.index}/${event.of} ${event.name}`));
    const { dir, full, assistant, slim, ...rest } = await costEff(config('once', { onEvent }));
    expect(stages).toEqual(['1/5 assistant', '2/5 slim-1', '3/5 slim-2', '4/5 hidden', '5/5 prediction']);
    expect(rest).toMatchObject({ stopped: 'done', metric: 'accuracy', badRows: 0, truncated: 0 });
    expect(slim).toMatchObject({ heads: [2, 2, 2, 2], ffn: [12, 12, 12, 12], rank: 8 });
    expect(slim!.parameters).toBeLessThan(full!.parameters * 0.6);
    expect(slim!.flops).toBeLessThan(full!.flops * 0.6);
    expect(full!.quality).toBe(1);
    expect(assistant!.quality.at(-1)).toBeGreaterThan(0.95);
    expect(slim!.quality.at(-1)).toBeGreaterThan(0.9);
    for (const [name, model] of Object.entries({ assistant, model: slim })) {
      const elastic = (await readElastic(join(dir, name)))!;
      expect(elastic.policy.exits!.map(({ afterLayer }) => afterLayer)).toEqual([0, 1, 2]);
      await using loaded = await loadModel(join(dir, name));
      const share = async (options: object) => {
        const told = await loaded.classify(
          heldOut.map(({ text }) => text),
          options,
        );
        return { told, right: told.filter(({ label }, i) => label === heldOut[i].label).length / heldOut.length };
      };
      const all = await share({});
      expect(all.right).toBeCloseTo(model!.quality.at(-1)!, 12);
      expect(all.told[0].compute.flops).toBe(all.told[0].compute.flopsFull);
      // Whoever is as sure as can be leaves at the first exit.
      for (const layer of [0, 1, 2]) {
        const { told, right } = await share({ exit: { rule: 'maxprob', threshold: 0.01, minLayer: layer } });
        expect(told.map(({ compute }) => compute.exitLayer)).toEqual(heldOut.map(() => layer));
        expect(right).toBeCloseTo(model!.quality[layer], 12);
      }
    }
    expect(JSON.parse(readFileSync(join(dir, 'report.json'), 'utf8'))).toEqual({ full, assistant, slim });
  });

  it('killed in any stage and started again, it ends at the same bits, and does nothing twice', async () => {
    const out = join(root, 'twice');
    let steps = 0;
    const interrupted = async (after: number) => {
      const controller = new AbortController();
      let left = after;
      const result = await costEff(
        config('twice', {
          signal: controller.signal,
          onEvent: (event) => {
            if (event.type !== 'step') return;
            steps++;
            if (--left === 0) controller.abort();
          },
        }),
      );
      expect(result).toMatchObject({ stopped: 'signal' });
    };
    for (const after of [7, 45, 9]) await interrupted(after);
    await costEff(config('twice', { onEvent: (event) => void (event.type === 'step' && steps++) }));
    const once = join(root, 'once');
    const count = readdirSync(join(once, 'stages')).reduce(
      (sum, stage) =>
        sum + (readFileSync(join(once, 'stages', stage, 'metrics.jsonl'), 'utf8').match(/"type":"step"/g) ?? []).length,
      0,
    );
    expect(steps).toBe(count);
    for (const file of ['model/model.safetensors', 'model/elastic_router.safetensors', 'assistant/model.safetensors'])
      expect(await sha256File(join(out, file))).toBe(await sha256File(join(once, file)));
    const again: string[] = [];
    await costEff(config('twice', { onEvent: (event) => void again.push(event.type) }));
    expect(new Set(again)).toEqual(new Set(['stage']));
    await expect(costEff(config('twice', { seed: 5 }))).rejects.toThrow(InvalidDataError);
    await expect(costEff(config('twice', { seed: 5 }))).rejects.toThrow(
      'was made with other settings, data or another model',
    );
  });

  it('divides parts among layers by importance, and measures it by the classifier alone, if asked', async () => {
    const short = { epochs: 1, lr: 1e-3 };
    const { slim } = await costEff(
      config('divided', {
        ...{ target: { heads: 2, ffn: 6 }, allocation: 'importance', calibration: 'classifier' },
        ...{ assistant: short, slim: short, hidden: short, prediction: short },
      }),
    );
    expect(slim!.rank).toBeNull();
    expect(slim!.heads.reduce((a, b) => a + b)).toBe(8);
    expect(slim!.ffn.reduce((a, b) => a + b)).toBe(24);
    expect(new Set(slim!.ffn).size).toBeGreaterThan(1);
  });

  it.each<[string, object, string]>([
    ['more heads', { target: { heads: 5, ffn: 4 } }, '[costEff] target.heads must be an integer from 1 to 4, got 5'],
    ['no target', { target: undefined }, 'target must be { heads, ffn, rank }'],
    [
      'a rank that is none',
      { target: { heads: 1, ffn: 4, rank: 0 } },
      'target.rank must be an integer from 1 to 16, got 0',
    ],
    ['nothing held out', { evalData: undefined }, 'give evalData or heldOut'],
    ['epochs of all', { epochs: 3 }, 'epochs is of every stage'],
    ['a rate of all', { optimizer: { lr: 1 } }, 'optimizer.lr is of every stage'],
    ['a bad stage', { slim: { restore: -1 } }, 'slim.restore must be a positive number, got -1'],
    ['an unknown key', { hidden: { steps: 1 } }, "unknown key of hidden 'steps'"],
    ['no classifier', { from: encoderDirectory('bert') }, 'must be a classifier of several classes'],
    ['a score', { from: encoderDirectory('distilbert-score') }, 'must be a classifier of several classes'],
    ['an elastic directory', { from: join(root, 'once/model') }, 'start from its base'],
  ])('refuses %s', async (name, more, message) => {
    const out = join(root, `refused-${name}`);
    await expect(costEff(config('', { ...more, out } as Partial<CostEffConfig>))).rejects.toThrow(message);
    expect(existsSync(join(out, 'stages'))).toBe(false);
  });
});

it('every weight has a slot', () => {
  const { spec, weights } = randomExited();
  expect(exitedSlots(spec).map(({ name }) => name)).toEqual([...weights.keys()].sort(byOrderOf(exitedSlots(spec))));
});

const byOrderOf = (slots: readonly { name: string }[]) => {
  const order = new Map(slots.map(({ name }, i) => [name, i]));
  return (a: string, b: string) => order.get(a)! - order.get(b)!;
};
