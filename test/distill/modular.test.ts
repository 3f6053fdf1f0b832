// Modules of encoder-decoder models: which assemblies are drawn, what they lose, and the run: its modules, resuming, bad settings.
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it, test } from 'vitest';
import { BadRows, readExamples } from '../../lib/distill/encoder/examples.js';
import { Random } from '../../lib/distill/random.js';
import { drawAssembly, drawWidth } from '../../lib/distill/seq2seq/draws.js';
import { encodePairs } from '../../lib/distill/seq2seq/finetune.js';
import { openSeq2Seq } from '../../lib/distill/seq2seq/model.js';
import type { PairData } from '../../lib/distill/seq2seq/pairs.js';
import {
  type Composed,
  type ModuleLosses,
  type Replacing,
  replacing,
  type SourceShares,
} from '../../lib/distill/seq2seq/replacing.js';
import type { Budget } from '../../lib/elastic/budget.js';
import { type Assembly, assemblyProblem, ladder, type Modules, spansOf } from '../../lib/elastic/modules.js';
import { sourceRouterId } from '../../lib/elastic/policy.js';
import { readElastic } from '../../lib/elastic/store.js';
import { finetune, InvalidArgumentError, type ModularConfig, modular, type TrainEvent } from '../../lib/index.js';
import { type ElasticModel, loadModel } from '../../lib/infer/model.js';
import { logSoftmax } from '../../lib/infer/seq2seq/writing.js';
import { sha256File } from '../../lib/io/files.js';
import { Checkpoint } from '../../lib/io/safetensors.js';
import { loadSeq2SeqWeights } from '../../lib/model/seq2seq_weights.js';
import { Engine, loadAddon } from '../../lib/native/index.js';
import { deepSeq2Seq, writeNarrow } from '../infer/modules.js';
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
  composed: Composed = {},
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
  const options = { engine, batchTokens: 512, ...composed };
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
        const terms = await student.run({ assembly: copies }, batch, { weight: 1 / batch.target.targets.length });
        expect(terms).toMatchObject({ logits: 0, hidden: 0, attention: 0 });
        expect(terms.loss).toBe(terms.task);
        const quality = await student.quality({ assembly: copies }, pairs);
        expect(quality.divergence).toBe(0);
        expect(quality.loss).toBeGreaterThan(0.1);
      },
    ));

  it('has the gradients that its loss has, in its modules alone', () =>
    opened(granular, async (student, pairs) => {
      const assembly = { encoder: ['0-1', '2', '3'], decoder: ['0-1', '2', '3'] };
      const { batch } = pairs.next({ epoch: 0, segment: 0 }, 128, null);
      const at = { weight: 1 / batch.target.targets.length };
      const terms = await student.run({ assembly }, batch, at);
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
          return (await student.run({ assembly }, batch, at)).loss;
        };
        const step = 2e-4;
        const measured = ((await lossAt(step)) - (await lossAt(-step))) / (2 * step);
        const expected = gradients.reduce((total, g, i) => total + g * direction[i], 0);
        expect(Math.abs(measured - expected) / Math.abs(expected), prefix).toBeLessThan(0.03);
      }
    }));
});

describe('corrections and widths', () => {
  const layers = [0, 1, 2, 3];
  const lora = { rank: 2, targets: ['q', 'k', 'v', 'o', 'up', 'down'], layers } as const;
  const nested = { layers, granularities: [0.5, 1], alignment: 8, scores: 'none' } as const;
  const pairs = (layers: number): Modules => ({ encoder: spansOf(layers, [2]), decoder: spansOf(layers, [2]) });
  const assembly = { encoder: ['0-1', '2', '3'], decoder: ['0', '1', '2-3'] };

  it('begin as nothing: an assembly loses what it loses without them', async () => {
    const terms = (composed: Composed) =>
      opened(
        pairs,
        async (student, data) => {
          const { batch } = data.next({ epoch: 0, segment: 0 }, 256, null);
          return await student.run({ assembly }, batch, { weight: 1 });
        },
        composed,
      );
    expect(await terms({ lora, nested })).toEqual(await terms({}));
  });

  it('leave the whole model as it is, and no other', () =>
    opened(
      pairs,
      async (student, data) => {
        const { trainable } = student;
        trainable.params.write(trainable.params.readFloat().map((x, i) => x + 0.02 * Math.sin(i)));
        const whole = { encoder: ['0', '1', '2', '3'], decoder: ['0', '1', '2', '3'] };
        const at = async (ffnWidth?: number, of = whole) =>
          (await student.quality({ assembly: of, ...(ffnWidth && { ffnWidth }) }, data)).divergence;
        expect([await at(), await at(1), await at(64)]).toEqual([0, 0, 0]);
        const kept = { encoder: whole.encoder, decoder: ['0', '1', '2-3'] };
        const found = [await at(0.5), await at(32), await at(0.5, kept), await at(undefined, kept)];
        expect(found[0]).toBe(found[1]);
        expect(found[0]).toBeGreaterThan(0.01);
        expect(new Set(found).size).toBe(3);
      },
      { lora, nested },
    ));

  it('have the gradients that the loss has, of kept layers and of the units that run', () =>
    opened(
      pairs,
      async (student, data) => {
        const { batch } = data.next({ epoch: 0, segment: 0 }, 128, null);
        const at = { weight: 1 / batch.target.targets.length };
        const { trainable } = student;
        const { parameters } = trainable.plan;
        const random = new Random(1, 'direction');
        const start = trainable.params.readFloat();
        for (const { name, offset, size } of parameters) {
          if (!name.includes('lora_B')) continue;
          for (let i = offset; i < offset + size; i++) start[i] = 0.05 * random.normal();
        }
        trainable.params.write(start);
        const settings = { assembly, ffnWidth: 0.5 };
        await student.run(settings, batch, at);
        const gradients = trainable.grads.readFloat();
        const of = (wanted: (name: string) => boolean) => parameters.filter(({ name }) => wanted(name));
        const learns = /^encoder\.(modules\.0-1|layers\.[23])\.|^decoder\.(modules\.2-3|layers\.[01])\./;
        for (const { name, offset, size } of parameters) {
          const own = gradients.subarray(offset, offset + size);
          expect([name, own.some((x) => x !== 0)]).toEqual([name, learns.test(name)]);
          // Of units beyond the first half nothing is learned.
          if (/^encoder\.modules\.0-1\.up\.weight$/.test(name))
            expect(own.subarray(size / 2).some((x) => x !== 0)).toBe(false);
        }
        for (const group of [/lora_A$/, /lora_B$/, /cross\.[qkvo]\.lora/, /modules/]) {
          const direction = new Float32Array(start.length);
          for (const { offset, size } of of((name) => group.test(name) && learns.test(name)))
            for (let i = offset; i < offset + size; i++) direction[i] = random.normal();
          const lossAt = async (step: number) => {
            trainable.params.write(start.map((x, i) => x + step * direction[i]));
            return (await student.run(settings, batch, at)).loss;
          };
          const step = 5e-4;
          const measured = ((await lossAt(step)) - (await lossAt(-step))) / (2 * step);
          const expected = gradients.reduce((total, g, i) => total + g * direction[i], 0);
          expect(Math.abs(measured - expected) / Math.abs(expected), `${group}`).toBeLessThan(0.03);
        }
      },
      { lora, nested },
    ));

  it('widths are drawn whole more often than not', () => {
    const { granularities } = { granularities: [0.25, 0.5, 1] };
    const draw = (corrections: boolean) =>
      Array.from({ length: 600 }, (_, i) => drawWidth({ granularities }, corrections, new Random(3, 'test', i)));
    const count = (width: number | undefined) => draw(true).filter(({ ffnWidth }) => ffnWidth === width).length;
    expect(count(undefined) + count(0.25) + count(0.5)).toBe(600);
    expect(count(undefined)).toBeGreaterThan(350);
    expect(Math.min(count(0.25), count(0.5))).toBeGreaterThan(60);
    // Some of the narrower ones run all layers, where these have corrections to learn.
    const all = (corrections: boolean) => draw(corrections).filter((settings) => 'assembly' in settings);
    expect(all(false)).toEqual([]);
    expect(all(true).length).toBeGreaterThan(40);
    expect(all(true).every(({ ffnWidth }) => ffnWidth !== undefined)).toBe(true);
  });
});

describe('routed sources', () => {
  const modules = (layers: number): Modules => ({ encoder: spansOf(layers, [2]), decoder: spansOf(layers, [2]) });
  const whole = { encoder: ['0', '1', '2', '3'], decoder: ['0', '1', '2', '3'] };
  const some = { encoder: ['0-1', '2', '3'], decoder: ['0-1', '2', '3'] };
  const composed = { sourceTokens: { layers: 4, capacity: { attn: [0.5, 1], mlp: [0.5, 1] } } } as const;
  const tokens = (shares: SourceShares, seed = 1) => ({ shares: () => shares, random: new Random(seed, 'noise') });

  it('lose nothing where all tokens enter, and leave gradients to modules and routers in use', () =>
    opened(
      modules,
      async (student, pairs) => {
        const { batch } = pairs.next({ epoch: 0, segment: 0 }, 128, null);
        const at = { weight: 1 / batch.target.targets.length };
        const plain = await student.run({ assembly: some }, batch, at);
        const before = student.trainable.grads.readFloat();
        student.trainable.grads.write(new Float32Array(before.length));
        expect(await student.run({ assembly: some }, batch, { ...at, tokens: tokens({ attn: 1, mlp: 1 }) })).toEqual(
          plain,
        );
        expect(student.trainable.grads.readFloat()).toEqual(before);
        expect((await student.quality({ assembly: whole, tokenCapacity: { attn: 1 } }, pairs)).divergence).toBe(0);
        expect(
          (await student.quality({ assembly: whole, tokenCapacity: { attn: 0.5 } }, pairs)).divergence,
        ).toBeGreaterThan(0);
        for (const [assembly, shares] of [
          [some, { attn: 0.5 }],
          [some, { attn: 0.5, mlp: 0.5 }],
          [whole, { mlp: 0.5 }],
        ] as const) {
          student.trainable.grads.write(new Float32Array(before.length));
          await student.run({ assembly }, batch, { ...at, tokens: tokens(shares) });
          const gradients = student.trainable.grads.readFloat();
          const modular = assembly === some ? /^(encoder|decoder)\.modules\.0-1\.(?!(attn|mlp)\.token)/ : /^$/;
          for (const { name, offset, size } of student.trainable.plan.parameters) {
            const [, part, place] = /^encoder\.(?:layers|modules)\.(.*)\.(attn|mlp)\.token\.weight$/.exec(name) ?? [];
            const routed = part !== undefined && assembly.encoder.includes(part) && place in shares;
            const learns = gradients.subarray(offset, offset + size).some((x) => x !== 0);
            // The bias of a router moves all scores alike, which a choice by rank does not see.
            if (!name.endsWith('.token.bias')) expect(learns, name).toBe(routed || modular.test(name));
          }
        }
      },
      composed,
    ));

  it('have the gradients that their loss has, in modules and in corrections of layers, of the units that run', () =>
    opened(
      modules,
      async (student, pairs) => {
        const { trainable } = student;
        const { batch } = pairs.next({ epoch: 0, segment: 0 }, 128, null);
        const random = new Random(1, 'direction');
        // Scores far apart, so that a step changes no choice.
        const values = trainable.params.readFloat();
        for (const { name, offset, size } of trainable.plan.parameters)
          for (let i = 0; i < size; i++) {
            if (name.endsWith('.token.weight')) values[offset + i] = 3 * random.normal();
            else if (name.includes('lora_B')) values[offset + i] = 0.05 * random.normal();
          }
        const run = (params: Float32Array) => {
          trainable.params.write(params);
          const at = { weight: 1 / batch.target.targets.length, tokens: tokens({ attn: 0.6, mlp: 0.6 }) };
          return student.run({ assembly: some, ffnWidth: 0.5 }, batch, at);
        };
        trainable.grads.write(new Float32Array(values.length));
        const terms = await run(values);
        for (const name of ['hidden', 'attention'] as const) expect(terms[name], name).toBeGreaterThan(0);
        const gradients = trainable.grads.readFloat();
        for (const prefix of [
          'encoder.modules.0-1.',
          'decoder.modules.0-1.',
          'encoder.layers.2.',
          'decoder.layers.3.',
        ]) {
          const direction = new Float32Array(values.length);
          for (const { name, offset, size } of trainable.plan.parameters) {
            if (!name.startsWith(prefix) || name.includes('.token.')) continue;
            for (let i = offset; i < offset + size; i++) direction[i] = random.normal();
          }
          const step = prefix.includes('layers') ? 2e-3 : 2e-4;
          const lossAt = async (by: number) => (await run(values.map((x, i) => x + by * direction[i]))).loss;
          const measured = ((await lossAt(step)) - (await lossAt(-step))) / (2 * step);
          const expected = gradients.reduce((total, g, i) => total + g * direction[i], 0);
          expect(Math.abs(measured - expected) / Math.abs(expected), prefix).toBeLessThan(0.03);
        }
      },
      {
        ...composed,
        lora: { rank: 2, targets: ['q', 'v', 'o', 'up', 'down'], layers: [0, 1, 2, 3] },
        nested: { layers: [0, 1, 2, 3], granularities: [0.5, 1], alignment: 8, scores: 'none' },
      },
    ));

  it('have routers that a step down their gradient makes better than a step up', () =>
    opened(
      modules,
      async (student, pairs) => {
        const { trainable } = student;
        const start = trainable.params.readFloat();
        let [all, better] = [0, 0];
        for (const assembly of [whole, some]) {
          for (const place of ['attn', 'mlp'] as const) {
            const shares = { [place]: 0.5 };
            trainable.params.write(start);
            trainable.grads.write(new Float32Array(start.length));
            for (let explore = 0; explore < 6; explore++) {
              const { batch } = pairs.next({ epoch: 0, segment: 0 }, 512, null);
              await student.run({ assembly }, batch, {
                weight: 1 / batch.target.targets.length,
                tokens: tokens(shares, explore),
              });
            }
            const gradients = trainable.grads.readFloat();
            for (const part of assembly.encoder) {
              const id = sourceRouterId(part, place);
              const { offset, size } = trainable.plan.parameters.find(({ name }) => name === `${id}.weight`)!;
              const own = gradients.subarray(offset, offset + size);
              const length = Math.hypot(...own);
              expect(length, id).toBeGreaterThan(0);
              const after = async (sign: number) => {
                const values = start.slice();
                for (const [i, g] of own.entries()) values[offset + i] = (sign * g) / length;
                trainable.params.write(values);
                return (await student.quality({ assembly, tokenCapacity: shares }, pairs)).divergence;
              };
              all++;
              better += Number((await after(-1)) < (await after(1)));
            }
          }
        }
        expect(all).toBe(14);
        expect(better / all).toBeGreaterThan(0.8);
      },
      composed,
    ));
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

/** Cross-entropy of the targets of held-out examples as a model writes them at a budget, token by token. */
async function lossOf(model: ElasticModel, budget: Budget): Promise<number> {
  const { tokenizer, sourceTokenizer, settings, spec } = model.seq2seq.network;
  const { vocab } = spec.decoder;
  let [loss, tokens] = [0, 0];
  for (const { text, label } of evalData.examples) {
    const target = tokenizer!.encode(label);
    const read = [settings.startId, ...target.slice(0, -1)];
    const logits = await model.seq2seq.logits(sourceTokenizer!.encode(text), read, { budget });
    for (const [i, id] of target.entries()) loss -= logSoftmax(logits.subarray(i * vocab, (i + 1) * vocab))[id];
    tokens += target.length;
  }
  return loss / tokens;
}

test('with corrections and widths, what is written is what was measured', async () => {
  const nested = { granularities: [0.5, 1] };
  const events: TrainEvent[] = [];
  const result = await modular(
    tiny('composed', { lora: { rank: 4 }, nested, onEvent: (event) => void events.push(event) }),
  );
  expect(events.some((event) => event.type === 'measure' && event.what === 'importance')).toBe(true);
  const { dir, assemblies } = result;
  const { policy } = (await readElastic(dir))!;
  expect(policy.lora).toEqual({ rank: 4, targets: ['q', 'k', 'v', 'o', 'up', 'down'], layers: [0, 1, 2, 3] });
  expect(policy.nested).toMatchObject({ ...nested, scores: 'activation', trained: 'modules' });
  expect(existsSync(join(dir, 'ordered'))).toBe(false);
  const [files, before] = [Checkpoint.open(dir), Checkpoint.open(base)];
  using _ = { [Symbol.dispose]: () => [files, before].map((file) => file.dispose()) };
  // The same units in another order.
  const up = (file: Checkpoint) => file.tensor('model.encoder.layers.1.fc1.bias').readFloat();
  expect(up(files)).not.toEqual(up(before));
  expect(up(files).sort()).toEqual(up(before).sort());
  expect(policy.base.name).toBe('base');
  await using model = await loadModel(dir);
  await using plain = await loadModel(base);
  expect(await lossOf(plain, 'full')).toBeCloseTo(assemblies![0].loss, 4);
  const settingsOf = assemblies!.map(({ assembly, ffnWidth }) => ({ assembly, ...(ffnWidth && { ffnWidth }) }));
  expect(settingsOf.filter(({ ffnWidth }) => ffnWidth === 0.5)).toHaveLength(settingsOf.length / 2);
  for (const i of [0, 1, 2, 3, settingsOf.length - 1]) {
    expect(await lossOf(model, { spec: settingsOf[i] }), JSON.stringify(settingsOf[i])).toBeCloseTo(
      assemblies![i].loss,
      4,
    );
  }
});

test.each(['bart', 'marian', 't5', 't5-gated'])(
  'of any family learn with corrections, widths and routers: %s',
  async (name) => {
    const deep = await deepSeq2Seq(name, { encoder: 2, decoder: 4 });
    // The heads of BART and Marian have a bias.
    const even = writeLetters(await writeNarrow(deep, temporaryDirectory(), 32));
    const { dir, assemblies } = await modular({
      ...{ ...common, from: even, out: join(root, `${name}-modules`), data, evalData, granularities: [2], steps: 6 },
      ...{ evalEvery: 6, optimizer: { lr: 1e-2 }, lora: { rank: 3 }, nested: { granularities: [0.25, 0.5, 1] } },
      tokens: { attn: [0.4, 0.9], mlp: 0.6 },
    });
    await using model = await loadModel(dir);
    await using whole = await loadModel(even);
    const unrouted = assemblies!.filter(({ tokenCapacity }) => !tokenCapacity);
    expect(assemblies!.length).toBe(unrouted.length + 8);
    expect(unrouted.map(({ ffnWidth }) => ffnWidth)).toEqual(unrouted.map((_, i) => [undefined, 0.5, 0.25][i % 3]));
    expect(await lossOf(whole, 'full')).toBeCloseTo(assemblies![0].loss, 4);
    for (const { loss, divergence: _, accuracy: __, ...spec } of assemblies!)
      expect(await lossOf(model, { spec }), JSON.stringify(spec)).toBeCloseTo(loss, 3);
    expect(new Set(assemblies!.map(({ divergence }) => divergence)).size).toBe(assemblies!.length);
  },
);

test('stopped and started again, on another number of threads, it ends at the same bits', async () => {
  const composed = {
    lora: { rank: 2, targets: ['q', 'up'] },
    nested: { granularities: [0.5, 1], rank: 'taylor' },
  } as const;
  const config = tiny('once', {
    ...composed,
    tokens: { attn: 0.5, mlp: [0.4, 0.9] },
    steps: 8,
    evalEvery: 4,
    saveEvery: 3,
    gradAccumulation: 2,
    gradCheckpointing: true,
  });
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
  for (const file of ['elastic_router.safetensors', 'adapter/adapter_model.safetensors', 'model.safetensors'])
    expect(await sha256File(join(out, file))).toBe(await sha256File(join(config.out, file)));
  await expect(modular({ ...config, out, lora: { rank: 4 } })).rejects.toThrow('was made with');
  await expect(modular({ ...config, out, granularities: [2] })).rejects.toThrow('was made with granularities');
});

test('routers learn with modules, and are written with what they are trained for', async () => {
  const events: TrainEvent[] = [];
  const tokens = { attn: [0.4, 1], mlp: 0.6 } as const;
  const result = await modular(tiny('routed', { tokens, steps: 240, onEvent: (event) => void events.push(event) }));
  const evals = events.flatMap((event) => (event.type === 'eval' ? [event.levels] : []));
  const level = 'encoder=0,1,2,3;decoder=0,1,2,3;attn=0.7;mlp=0.6';
  expect(Object.keys(evals[0])).toHaveLength(3 + 4);
  expect(Object.keys(evals[0])).toContain(level);
  // Of the whole model nothing learns but routers: they choose better than random ones.
  const random: number[] = [];
  await opened(
    (layers) => ({ encoder: [], decoder: spansOf(layers, [2]) }),
    async (student, pairs) => {
      const values = student.trainable.params.readFloat();
      const [, routers] = student.trainable.plan.groups!;
      for (let seed = 0; seed < 8; seed++) {
        const draw = new Random(seed, 'routers');
        student.trainable.params.write(values.map((x, i) => (i < routers.offset ? x : draw.normal())));
        const tokenCapacity = { attn: 0.7, mlp: 0.6 };
        random.push((await student.quality({ tokenCapacity }, pairs)).divergence);
      }
    },
    { sourceTokens: { layers: 4, capacity: { attn: [0.4, 1], mlp: [0.6, 0.6] } } },
  );
  const mean = random.reduce((a, b) => a + b, 0) / random.length;
  expect(result.assemblies!.find(({ tokenCapacity }) => tokenCapacity)!.divergence).toBeLessThan(0.6 * mean);
  const { policy, routers } = (await readElastic(result.dir))!;
  expect(policy.sourceTokens).toEqual({ layers: 4, capacity: { attn: [0.4, 1], mlp: [0.6, 0.6] } });
  expect(routers.size).toBe(2 * (4 + 3));
  expect([...routers.values()].every(({ weight }) => weight.some((w) => w !== 0))).toBe(true);
  const measured = result.assemblies!.filter(({ tokenCapacity }) => tokenCapacity);
  expect(measured).toHaveLength(8);
  const [middle, low] = [measured[0], measured[4]];
  expect([middle.tokenCapacity, low.tokenCapacity]).toEqual([
    { attn: 0.7, mlp: 0.6 },
    { attn: 0.4, mlp: 0.6 },
  ]);
  expect(middle.divergence).toBeGreaterThan(0);
  expect(low.divergence).toBeGreaterThan(middle.divergence);
  await using model = await loadModel(result.dir);
  const { assembly } = result.assemblies!.at(-1)!;
  const stream = model.generate('a b c', { budget: { spec: { assembly, tokenCapacity: { attn: 0.5, mlp: 0.6 } } } });
  expect(await stream.text).not.toBe('');
  expect((await stream.usage).compute.effective.tokenCapacity).toEqual({ attn: 0.5, mlp: 0.6 });
});

test.each([
  ['no granularities', { granularities: [] }, 'granularities must be different integers above 1, got []'],
  ['one that does not fit', { granularities: [3] }, 'that divide 4 encoder or 4 decoder layers, got 3'],
  ['layers themselves', { granularities: [1] }, 'integers above 1 that divide'],
  ['a rate above 1', { replace: { start: 2 } }, 'replace.start must be a number from 0 to 1, got 2'],
  ['an unknown rate', { replace: { end: 1 } }, "unknown key of replace 'end'; it takes start, full"],
  ['a negative loss', { losses: { hidden: -1 } }, 'losses.hidden must be a number of zero or more, got -1'],
  ['no rank', { lora: {} as never }, 'lora.rank must be a positive integer, got undefined'],
  ['corrections of nothing', { lora: { rank: 2, targets: [] } }, 'lora.targets must be some of q, k, v, o, up, down'],
  [
    'a gate that is not there',
    { lora: { rank: 2, targets: ['gate'] } },
    'lora.targets must be some of q, k, v, o, up, down',
  ],
  ['corrections of some layers', { lora: { rank: 2, layers: [1] } as never }, "unknown key of lora 'layers'"],
  ['no narrower width', { nested: { granularities: [1] } }, 'nested: granularities must have one below 1, got [1]'],
  ['no whole width', { nested: { granularities: [0.5] } }, 'nested: granularities must end with 1'],
  [
    'an order that is none',
    { nested: { granularities: [0.5, 1], rank: 'size' as never } },
    'nested: rank must be one of',
  ],
  ['a share above 1', { tokens: { attn: 1.5 } }, 'tokens.attn must be a share in (0, 1] or an ascending range'],
  ['a range that falls', { tokens: { mlp: [0.9, 0.5] } }, 'an ascending range of them, got [0.9,0.5]'],
  ['tokens of nothing', { tokens: {} }, 'tokens must have some of attn, mlp'],
  ['tokens of blocks', { tokens: { block: 0.5 } as never }, "unknown key of tokens 'block'; it takes attn, mlp"],
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
