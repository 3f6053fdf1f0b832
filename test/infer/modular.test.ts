// Assemblies of encoder-decoder models at work: the bits of a stock checkpoint of the same layers, in company and alone, by every kind of budget.
import { describe, expect, it } from 'vitest';
import { flopsAt } from '../../lib/elastic/assemblies.js';
import type { Budget } from '../../lib/elastic/budget.js';
import { type TrainedModules, writeModules } from '../../lib/elastic/elastify.js';
import { type Assembly, assemblyPath, backboneOf, type Span, type Stack, stacks } from '../../lib/elastic/modules.js';
import { readElastic, writeLevels } from '../../lib/elastic/store.js';
import { type ElasticModel, loadModel } from '../../lib/infer/model.js';
import type { GenerateOptions } from '../../lib/infer/types.js';
import { writingFlops } from '../../lib/model/flops.js';
import { isModule } from '../../lib/model/parts.js';
import { largestDifference, readSeq2SeqCases } from '../model/golden.js';
import { temporaryDirectory } from '../temporary.js';
import {
  allModules,
  copiedModules,
  correctionsOf,
  deepSeq2Seq,
  halved,
  layersOf,
  modularDirectory,
  nestedAt,
  specOf,
  writeLayers,
  writeMerged,
  writeNarrow,
  written,
} from './modules.js';

const assemblies: Assembly[] = [
  { encoder: ['0', '1', '2', '3'], decoder: ['0-5'] },
  { encoder: ['0-3'], decoder: ['0', '1', '2-3', '4', '5'] },
  { encoder: ['0', '1', '2-3'], decoder: ['0-2', '3', '4-5'] },
];

describe.each(['bart', 'marian', 't5', 't5-gated'])('%s', (name) => {
  const { sources } = readSeq2SeqCases(name);

  it('gives what a stock checkpoint of the same layers gives, bit for bit, and the whole model its own', async () => {
    const { dir, base } = await modularDirectory(name);
    await using model = await loadModel(dir);
    await using whole = await loadModel(base);
    expect(model.info.modules!.decoder).toEqual(['0-1', '2-3', '4-5', '0-2', '3-5', '0-5']);
    const full = await written(whole, sources[0]);
    for (const budget of ['full', 1, { spec: {} }, { spec: { assembly: backboneOf(specOf(base)) } }] as const) {
      const { compute, ...text } = await written(model, sources[0], { budget });
      expect(text).toEqual({ ids: full.ids, logprobs: full.logprobs });
      expect([compute.ratio, compute.effective]).toEqual([1, {}]);
      expect(compute.flops).toBe(full.compute.flops);
    }
    const texts = new Set([full.ids.join()]);
    for (const assembly of assemblies) {
      const stock = await writeLayers(base, temporaryDirectory(), layersOf(assembly));
      await using oracle = await loadModel(stock);
      for (const options of [{}, { beams: 3 }, { temperature: 1, seed: 5 }]) {
        const wanted = await written(oracle, sources[1], options);
        const { compute, ids, logprobs } = await written(model, sources[1], {
          ...options,
          budget: { spec: { assembly } },
        });
        expect({ ids, logprobs }).toEqual({ ids: wanted.ids, logprobs: wanted.logprobs });
        expect(compute.flops).toBe(wanted.compute.flops);
        expect(compute.effective).toEqual({ assembly });
        if (!('beams' in options)) {
          const flops = flopsAt(specOf(base), { assembly }, null);
          expect(compute.flops).toBe(writingFlops(flops, sources[1].length, ids.length));
        }
        expect(compute.ratio).toBeLessThan(1);
        // Layers of the decoder that ran as they are.
        const own = Array.from({ length: 6 }, (_, i) => (assembly.decoder.includes(String(i)) ? 1 : 0));
        expect([...compute.layersRun.attn]).toEqual(own);
        expect([...compute.layersRun.mlp]).toEqual(own);
        texts.add(`${ids}/${logprobs}`);
      }
    }
    expect(texts.size).toBeGreaterThan(assemblies.length);
  });
});

describe('nested feed-forwards', () => {
  /** Both stacks as wide: golden models have 40 units, or 40 and 32. */
  const evened = (base: string) => writeNarrow(base, temporaryDirectory(), 32);

  it.each(['marian', 't5', 't5-gated'])(
    'run as a stock checkpoint of so many units, without new programs: %s',
    async (name) => {
      const { sources } = readSeq2SeqCases(name);
      const { dir, base } = await modularDirectory(name, [], evened, () => ({ nested: nestedAt([0.5, 1], 4) }));
      const { ffn } = specOf(base).decoder;
      await using model = await loadModel(dir);
      await using whole = await loadModel(base);
      const full = await written(whole, sources[0]);
      for (const budget of ['full', { spec: { ffnWidth: 1 } }, { spec: { ffnWidth: ffn } }] as const) {
        const { compute, ...text } = await written(model, sources[0], { budget });
        expect(text).toEqual({ ids: full.ids, logprobs: full.logprobs });
        expect([compute.flops, compute.effective]).toEqual([full.compute.flops, {}]);
      }
      for (const [assembly, units] of [
        [undefined, ffn / 2],
        [assemblies[2], 8],
        [assemblies[2], ffn / 2],
      ] as const) {
        const layers = await writeLayers(base, temporaryDirectory(), layersOf(assembly ?? backboneOf(specOf(base))));
        await using oracle = await loadModel(await writeNarrow(layers, temporaryDirectory(), units));
        for (const options of [{}, { beams: 3 }]) {
          const wanted = await written(oracle, sources[1], options);
          const budget = { spec: { ...(assembly && { assembly }), ffnWidth: units } };
          const { compute, ids, logprobs } = await written(model, sources[1], { ...options, budget });
          expect({ ids, logprobs }).toEqual({ ids: wanted.ids, logprobs: wanted.logprobs });
          expect(compute.flops).toBe(wanted.compute.flops);
          expect(compute.effective).toEqual({ ...(assembly && { assembly }), ffnWidth: units / ffn });
          const ran = Array.from({ length: 6 }, (_, i) => (!assembly || assembly.decoder.includes(`${i}`) ? 1 : 0));
          expect([...compute.layersRun.mlp]).toEqual(ran.map((one) => Math.fround((one * units) / ffn)));
          expect([...compute.layersRun.attn]).toEqual(ran);
        }
      }
    },
  );

  it('of several widths at once each give the bits that they give alone', async () => {
    const { sources } = readSeq2SeqCases('marian');
    const { dir } = await modularDirectory('marian', [], evened, () => ({ nested: nestedAt([0.5, 1], 4) }));
    await using model = await loadModel(dir);
    const budgets = [1, 0.5, 0.25].flatMap((ffnWidth) => [
      { spec: { ffnWidth } },
      { spec: { assembly: assemblies[0], ffnWidth } },
    ]);
    const alone: Awaited<ReturnType<typeof written>>[] = [];
    for (const [i, budget] of budgets.entries()) alone.push(await written(model, sources[i % 3], { budget }));
    const together = await Promise.all(budgets.map((budget, i) => written(model, sources[i % 3], { budget })));
    for (const [i, { ids, logprobs, compute }] of together.entries()) {
      expect({ ids, logprobs }).toEqual({ ids: alone[i].ids, logprobs: alone[i].logprobs });
      expect(compute.effective).toEqual(alone[i].compute.effective);
    }
    expect(new Set(alone.map(({ logprobs }) => logprobs.join())).size).toBe(budgets.length);
  });

  it('have widths that the model has', async () => {
    const spec = { assembly: assemblies[0], ffnWidth: 0.5 };
    const { dir } = await modularDirectory('t5', [{ name: 'half', spec }], undefined, () => ({
      nested: nestedAt([0.5, 1], 4),
    }));
    await using model = await loadModel(dir);
    const half = model.resolve('half');
    const { ffn } = specOf(dir).decoder;
    expect([half.spec, half.widths]).toEqual([spec, [ffn / 2]]);
    expect(half.flopsRatio).toBeLessThan(model.resolve({ spec: { assembly: assemblies[0] } }).flopsRatio);
    // Numbers are assemblies at the full width.
    expect(model.resolve(0.5).spec).not.toHaveProperty('ffnWidth');
    const at = (ffnWidth: unknown) => () => model.resolve({ spec: { ffnWidth: ffnWidth as number } });
    expect(at(6)).toThrow(/ffnWidth must be a multiple of the alignment 4, such as 4 or 8, got 6/);
    expect(at([0.5, 0.5, 0.5, 0.5, 1, 1])).toThrow(/ffnWidth must be one width: all parts of an encoder-decoder/);
    expect(at(2)).toThrow(/alignment/);
    expect(at('wide')).toThrow(/ffnWidth must be a share in \(0, 1\]/);
    const levels = [{ name: 'odd', spec: { ffnWidth: 6 } }];
    await expect(modularDirectory('t5', levels, undefined, () => ({ nested: nestedAt([0.5, 1], 4) }))).rejects.toThrow(
      /levels\[1\]\.spec\.ffnWidth must be a multiple/,
    );
    const some = { nested: { ...nestedAt([0.5, 1], 4), layers: [0, 1] } };
    await expect(modularDirectory('t5', [], undefined, () => some)).rejects.toThrow(/are of all its layers/);
    await expect(modularDirectory('bart', [], undefined, () => ({ nested: nestedAt([0.5, 1], 4) }))).rejects.toThrow(
      /one width in both stacks, and these have 40 and 32 units/,
    );
  });
});

describe('corrections', () => {
  it.each(['bart', 't5', 't5-gated'])(
    'run as a stock checkpoint that has them merged, but at full: %s',
    async (name) => {
      const { sources, targets } = readSeq2SeqCases(name);
      const { dir, base } = await modularDirectory(name, [], undefined, (from) => ({ lora: correctionsOf(from) }));
      const { lora, policy } = (await readElastic(dir))!;
      const written = correctionsOf(base);
      expect([policy.lora, lora]).toEqual([written.policy, written.matrices]);
      await using model = await loadModel(dir);
      await using whole = await loadModel(base);
      const ids = targets[0];
      const logits = (one: ElasticModel, budget: Budget = 'full') => one.seq2seq.logits(sources[1], ids, { budget });
      const full = await logits(whole);
      expect(await logits(model)).toEqual(full);
      expect(await logits(model, { spec: { assembly: backboneOf(specOf(base)) } })).toEqual(full);
      for (const assembly of assemblies) {
        // Modules are copies of layers without corrections.
        const of = (stack: Stack) => assembly[stack].map((part) => isModule(part));
        const plain = await writeLayers(base, temporaryDirectory(), layersOf(assembly));
        const own = new Map(
          stacks.flatMap((stack) =>
            of(stack).flatMap((module, i) =>
              module
                ? []
                : [...written.matrices].flatMap(([id, matrices]) => {
                    const layer = `${stack}.layers.${assembly[stack][i]}.`;
                    return id.startsWith(layer)
                      ? [[id.replace(layer, `${stack}.layers.${i}.`), matrices] as const]
                      : [];
                  }),
            ),
          ),
        );
        await using oracle = await loadModel(await writeMerged(plain, temporaryDirectory(), { matrices: own }));
        const [wanted, found] = [await logits(oracle), await logits(model, { spec: { assembly } })];
        await using without = await loadModel(plain);
        const size = Math.max(...wanted.map(Math.abs));
        expect(largestDifference(wanted, found)).toBeLessThan(2e-5 * size);
        expect(largestDifference(await logits(without), found)).toBeGreaterThan(own.size > 0 ? 0.01 * size : -1);
      }
    },
  );

  it('are counted as they are computed, alone and in company, at any width', async () => {
    const { sources } = readSeq2SeqCases('t5-gated');
    const { dir } = await modularDirectory('t5-gated', [], undefined, (from) => ({
      ...{ lora: correctionsOf(from, 3), nested: nestedAt([0.5, 1], 4) },
    }));
    await using model = await loadModel(dir);
    const { policy, spec } = model.seq2seq.network;
    const budgets = [
      { spec: { ffnWidth: 0.5 } },
      ...assemblies.flatMap((assembly) => [{ spec: { assembly } }, { spec: { assembly, ffnWidth: 0.5 } }]),
    ];
    const alone: Awaited<ReturnType<typeof written>>[] = [];
    for (const budget of budgets) {
      const own = await written(model, sources[1], { budget });
      const flops = flopsAt(spec, own.compute.effective, policy);
      expect(own.compute.flops).toBe(writingFlops(flops, sources[1].length, own.ids.length));
      alone.push(own);
    }
    const together = await Promise.all(budgets.map((budget) => written(model, sources[1], { budget })));
    for (const [i, { ids, logprobs, compute }] of together.entries()) {
      expect({ ids, logprobs }).toEqual({ ids: alone[i].ids, logprobs: alone[i].logprobs });
      expect(compute.flops / alone[i].compute.flops).toBeCloseTo(1, 9);
    }
    expect(new Set(alone.map(({ logprobs }) => logprobs.join())).size).toBe(budgets.length);
  });

  it('that do not fit are not written', async () => {
    const base = await deepSeq2Seq('t5');
    const modules = allModules(specOf(base));
    const write = (change: (lora: NonNullable<TrainedModules['lora']>) => NonNullable<TrainedModules['lora']>) => {
      const trained = { spec: modules, weights: copiedModules(base, modules), lora: change(correctionsOf(base)) };
      return writeModules(temporaryDirectory(), base, trained);
    };
    const id = 'decoder.layers.2.cross.k';
    const without = ({ policy, matrices }: NonNullable<TrainedModules['lora']>) => ({
      ...{ policy, matrices: new Map([...matrices].filter(([own]) => own !== id)) },
    });
    await expect(write(without)).rejects.toThrow(
      /decoder\.layers\.2\.cross\.k\.lora_A must be 48 finite numbers, \[2,24\], got none/,
    );
    const some = { rank: 2, targets: ['q'], layers: [0] } as const;
    await expect(write(({ matrices }) => ({ policy: some, matrices }))).rejects.toThrow(/are of all its layers/);
  });
});

describe('modules', () => {
  const { sources } = readSeq2SeqCases('bart');

  it('are told apart from the layers that they stand for', async () => {
    const base = await deepSeq2Seq('bart');
    const modules = allModules(specOf(base));
    const logprobsWith = async (of: (span: Span) => number) => {
      const dir = temporaryDirectory();
      await writeModules(dir, base, { spec: modules, weights: copiedModules(base, modules, of) });
      await using model = await loadModel(dir);
      const at = async (decoder: string[]) =>
        (
          await written(model, sources[0], {
            budget: { spec: { assembly: { encoder: ['0', '1', '2', '3'], decoder } } },
          })
        ).logprobs;
      return { pair: await at(['0', '1', '2-3', '4', '5']), triple: await at(['0-2', '3', '4', '5']) };
    };
    const last = await logprobsWith(({ last }) => last);
    const first = await logprobsWith(({ first }) => first);
    expect(last.pair).not.toEqual(first.pair);
    expect(last.triple).not.toEqual(first.triple);
    expect(last.pair).not.toEqual(last.triple);
  });

  it.each(['marian', 't5'])('of a checkpoint in bf16 are as its layers, as are packed ones: %s', async (name) => {
    const { dir, base } = await modularDirectory(name, [], halved);
    const assembly = assemblies[2];
    const stock = await writeLayers(base, temporaryDirectory(), layersOf(assembly));
    for (const options of [{}, { dtype: 'f16' }] as const) {
      await using model = await loadModel(dir, options);
      await using oracle = await loadModel(stock, options);
      const { ids, logprobs } = await written(oracle, sources[1]);
      const own = await written(model, sources[1], { budget: { spec: { assembly } } });
      expect({ ids: own.ids, logprobs: own.logprobs }).toEqual({ ids, logprobs });
    }
  });

  it('run in company with the bits that each assembly gives alone, and wait for places together', async () => {
    const { dir } = await modularDirectory('bart');
    const budgets = ['full', ...assemblies.map((assembly) => ({ spec: { assembly } })), 0.6] as const;
    const options: GenerateOptions[] = budgets.flatMap((budget, i) => [
      { budget },
      { budget, beams: 2 },
      { budget, temperature: 1, seed: i },
    ]);
    const alone: Awaited<ReturnType<typeof written>>[] = [];
    {
      await using model = await loadModel(dir);
      for (const [i, option] of options.entries()) alone.push(await written(model, sources[i % 3], option));
    }
    for (const maxSequences of [32, 5]) {
      await using model = await loadModel(dir, { maxSequences });
      const together = await Promise.all(options.map((option, i) => written(model, sources[i % 3], option)));
      for (const [i, { ids, logprobs, compute }] of together.entries()) {
        expect({ ids, logprobs }).toEqual({ ids: alone[i].ids, logprobs: alone[i].logprobs });
        // Shares of what was counted are by the formula, which is what is counted alone.
        expect(compute.flops / alone[i].compute.flops).toBeCloseTo(1, 9);
        expect([...compute.layersRun.attn]).toEqual([...alone[i].compute.layersRun.attn]);
      }
    }
  });

  it('run at more assemblies than programs are kept', async () => {
    const { dir } = await modularDirectory('bart');
    await using model = await loadModel(dir);
    const spec = specOf(dir);
    const ladder = assemblyPath(spec, allModules(spec), 'speed-first').map(({ decoder }) => decoder);
    const encoders = [['0', '1', '2', '3'], ['0-1', '2', '3'], ['0', '1', '2-3'], ['0-3']];
    const all = encoders.flatMap((encoder) => ladder.map((decoder) => ({ encoder, decoder })));
    expect(all.length).toBeGreaterThan(20);
    const first = await written(model, sources[0], { budget: { spec: { assembly: all[1] } } });
    await Promise.all(all.map((assembly) => written(model, sources[0], { budget: { spec: { assembly } } })));
    expect(await written(model, sources[0], { budget: { spec: { assembly: all[1] } } })).toMatchObject({
      ids: first.ids,
      logprobs: first.logprobs,
    });
  });
});

describe('budgets', () => {
  const { sources } = readSeq2SeqCases('t5');
  const fast: Assembly = { encoder: ['0-1', '2-3'], decoder: ['0-2', '3-5'] };
  const quality = { top1_agreement: { value: 0.9, lo: 0.88, hi: 0.92, n: 100 } };

  it('become assemblies: a share, a level, a quality', async () => {
    const { dir, base } = await modularDirectory('t5', [{ name: 'fast', spec: { assembly: fast }, quality }]);
    await using model = await loadModel(dir);
    const spec = specOf(base);
    const path = assemblyPath(spec, allModules(spec), 'speed-first');
    const ratios = path.map((assembly) => model.resolve({ spec: { assembly } }).flopsRatio);
    expect(ratios[0]).toBe(1);
    for (let i = 1; i < ratios.length; i++) {
      expect(ratios[i]).toBeLessThan(ratios[i - 1]);
      expect(model.resolve(ratios[i]).spec.assembly).toEqual(path[i]);
      expect(model.resolve((ratios[i] + ratios[i - 1]) / 2).spec.assembly).toEqual(path[i]);
    }
    expect(() => model.resolve(ratios.at(-1)! * 0.99)).toThrow(
      /cannot be reached: the smallest assembly, encoder=0-3;/,
    );
    expect(model.resolve('fast')).toMatchObject({ level: 'fast', spec: { assembly: fast }, full: false });
    expect(model.resolve({ minQuality: 0.85 }).level).toBe('fast');
    expect(model.resolve({ minQuality: 0.89 }).level).toBe('full');
    expect(model.resolve('full')).toMatchObject({ full: true, flopsRatio: 1, spec: {} });

    const { compute } = await written(model, sources[0], { budget: 'fast' });
    expect(compute).toMatchObject({ requested: 'fast', level: 'fast', effective: { assembly: fast } });
    const share = await written(model, sources[0], { budget: 0.5 });
    expect(share.compute).toMatchObject({ requested: 0.5, level: null });
    expect(share.compute.ratio).toBeLessThan(0.7);
    // A level that is measured later is one as well.
    await writeLevels(dir, [
      { name: 'full', spec: {} },
      { name: 'tiny', spec: { assembly: path.at(-1)! } },
    ]);
    expect((await readElastic(dir))!.policy.levels.map(({ name }) => name)).toEqual(['full', 'tiny']);
    await using again = await loadModel(dir);
    const tiny = await written(again, sources[0], { budget: 'tiny' });
    expect(tiny.compute.effective).toEqual({ assembly: path.at(-1) });
    expect(tiny.compute.ratio).toBeLessThan(share.compute.ratio);
  });

  it('that cannot be are refused at once', async () => {
    const { dir, base } = await modularDirectory('t5');
    await using model = await loadModel(dir);
    const encoder = ['0', '1', '2', '3'];
    const at = (budget: unknown) => () => model.generate(sources[0], { budget: budget as never });
    expect(at({ spec: { assembly: { encoder, decoder: ['0-2', '4-5'] } } })).toThrow(/decoder has a gap: layer 3/);
    expect(at({ spec: { assembly: { encoder, decoder: ['0-2', '2-3', '4-5'] } } })).toThrow(/has an overlap: 2-3/);
    expect(at({ spec: { assembly: { encoder, decoder: ['0-3', '4-5'] } } })).toThrow(/0-3, which the model lacks/);
    expect(at({ spec: { ffnWidth: 0.5 } })).toThrow(/ffnWidth must be absent: no feed-forward of this model is nested/);
    expect(at({ spec: { exit: true } })).toThrow(/has the settings assembly, ffnWidth, tokenCapacity, got 'exit'/);
    expect(at('slow')).toThrow(/no level is named 'slow'; there are full/);
    expect(at(0)).toThrow(/must be in \(0, 1\], got 0/);
    expect(at({ latencyMs: 5 })).toThrow(/needs times measured on this device/);
    expect(at({ minQuality: 0.9 })).toThrow(/quality of no level was measured/);
    expect(at({ colour: 1 })).toThrow(/a budget must be a number/);
    expect(() => model.generate([])).toThrow(/is empty/);
    expect(() => model.generate(new Array(600).fill(3))).toThrow(/has 600 tokens and the context holds/);
    await using plain = await loadModel(base);
    expect(() => plain.generate(sources[0], { budget: 0.5 })).toThrow(/needs modules, and this model has none/);
  });
});
