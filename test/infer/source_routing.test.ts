// Encoder-decoder models that read sources with some tokens left out of some sub-layers: budgets, bits, what is counted, and what is refused.
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { flopsAt, settingsRatio } from '../../lib/elastic/assemblies.js';
import { writeModules } from '../../lib/elastic/elastify.js';
import type { Assembly } from '../../lib/elastic/modules.js';
import { elasticConfigFile, readElastic, routerFile, writeLevels } from '../../lib/elastic/store.js';
import { type AssembleOptions, assemble } from '../../lib/infer/export/assemble.js';
import { loadModel } from '../../lib/infer/model.js';
import type { GenerateOptions } from '../../lib/infer/types.js';
import { openSafetensors } from '../../lib/io/safetensors.js';
import { writingFlops } from '../../lib/model/flops.js';
import { readSeq2SeqCases } from '../model/golden.js';
import { temporaryDirectory } from '../temporary.js';
import {
  allModules,
  copiedModules,
  correctionsOf,
  deepSeq2Seq,
  modularDirectory,
  nestedAt,
  sealed,
  someRouting,
  specOf,
  written,
} from './modules.js';

const assembly: Assembly = { encoder: ['0', '1', '2-3'], decoder: ['0-2', '3', '4-5'] };

/** A golden model with modules, routers, corrections if wanted and, where its stacks are of one width, nested feed-forwards. */
async function routed(name: string, corrected = true) {
  const base = await deepSeq2Seq(name);
  const spec = specOf(base);
  const modules = allModules(spec);
  const dir = temporaryDirectory();
  const weights = copiedModules(base, modules);
  const nested = spec.encoder.ffn === spec.decoder.ffn ? { nested: nestedAt([0.5, 1], 4) } : {};
  const lora = corrected ? { lora: correctionsOf(base) } : {};
  await writeModules(dir, base, { spec: modules, weights, routing: someRouting(spec, modules), ...nested, ...lora });
  return { base, dir, spec };
}

describe.each(['bart', 'marian', 't5'])('%s', (name) => {
  const { sources } = readSeq2SeqCases(name);

  it.each([false, true])(
    'is the backbone at full capacity, to the bit, and counts what it leaves out, corrected %s',
    async (corrected) => {
      const source = sources.reduce((a, b) => (b.length > a.length ? b : a));
      const { base, dir, spec } = await routed(name, corrected);
      const { policy } = (await readElastic(dir))!;
      await using model = await loadModel(dir);
      await using whole = await loadModel(base);
      const full = await written(whole, source);
      for (const tokenCapacity of [{}, { attn: 1 }, { attn: 1, mlp: [1, 1, 1, 1] }]) {
        const { compute, ...text } = await written(model, source, { budget: { spec: { tokenCapacity } } });
        expect(text).toEqual({ ids: full.ids, logprobs: full.logprobs });
        expect([compute.effective, compute.flops]).toEqual([{}, full.compute.flops]);
      }
      const seen = new Set([full.logprobs.join()]);
      for (const settings of [
        { tokenCapacity: { attn: 0.5 } },
        { tokenCapacity: { mlp: 0.5 } },
        { tokenCapacity: { attn: 0.7, mlp: [1, 0.5, 0, 0.25] } },
        { assembly, tokenCapacity: { attn: [1, 0.5, 0.2], mlp: 0.6 } },
        ...(policy.nested ? [{ assembly, ffnWidth: 0.5, tokenCapacity: { mlp: 0.6 } }] : []),
      ]) {
        const { ids, logprobs, compute } = await written(model, source, { budget: { spec: settings } });
        expect(compute.effective).toEqual(settings);
        expect(compute.flops).toBe(writingFlops(flopsAt(spec, settings, policy), source.length, ids.length));
        const { tokenCapacity: _, ...others } = settings;
        const point = model.resolve({ spec: settings });
        // The full budget has no corrections, which all others have.
        if (!corrected || Object.keys(others).length > 0) {
          const all = flopsAt(spec, others, policy).source(source.length);
          expect(flopsAt(spec, settings, policy).source(source.length)).toBeLessThan(0.95 * all);
          expect(point.flopsRatio).toBeLessThan(model.resolve({ spec: others }).flopsRatio);
        }
        expect(point.why).toMatch(/ % of tokens into (attn|mlp) of the encoder/);
        seen.add(logprobs.join());
      }
      expect(seen.size).toBe(policy.nested ? 6 : 5);
    },
  );

  it('gives every source in company the bits that it gets alone', async () => {
    const { dir } = await routed(name);
    const budgets = [
      ...[0.2, 0.5, 0.8].map((mlp) => ({ spec: { tokenCapacity: { mlp } } })),
      { spec: { tokenCapacity: { attn: 0.5, mlp: 0.5 } } },
      { spec: { tokenCapacity: { attn: [0.5, 1, 0.5, 0], mlp: 0.5 } } },
      { spec: { assembly, tokenCapacity: { attn: 0.4 } } },
      { spec: { assembly } },
      'full' as const,
    ];
    const options: GenerateOptions[] = budgets.flatMap((budget) => [{ budget }, { budget, beams: 2 }]);
    const alone: Awaited<ReturnType<typeof written>>[] = [];
    {
      await using model = await loadModel(dir);
      for (const [i, option] of options.entries()) alone.push(await written(model, sources[i % 3], option));
    }
    await using model = await loadModel(dir);
    const together = await Promise.all(options.map((option, i) => written(model, sources[i % 3], option)));
    for (const [i, { ids, logprobs, compute }] of together.entries()) {
      expect({ ids, logprobs }).toEqual({ ids: alone[i].ids, logprobs: alone[i].logprobs });
      expect(compute.flops / alone[i].compute.flops).toBeCloseTo(1, 9);
    }
  });
});

it('of layers alone, where only the decoder has modules', async () => {
  const base = await deepSeq2Seq('bart');
  const modules = { encoder: [], decoder: allModules(specOf(base)).decoder };
  const dir = temporaryDirectory();
  const routing = someRouting(specOf(base), modules, { mlp: [0.4, 0.8] });
  await writeModules(dir, base, { spec: modules, weights: copiedModules(base, modules), routing });
  expect((await readElastic(dir))!.policy.sourceTokens).toEqual({ layers: 4, capacity: { mlp: [0.4, 0.8] } });
  await using model = await loadModel(dir);
  expect(model.resolve({ spec: { tokenCapacity: { mlp: 0.3 } } }).why).toMatch(/below the 40 % it was trained for/);
  expect(model.resolve({ spec: { tokenCapacity: { mlp: 0.5 } } }).capacity).toMatchObject({ attn: 1, mlp: 0.5 });
  expect(() => model.resolve({ spec: { tokenCapacity: { attn: 0.5 } } })).toThrow(
    /tokenCapacity\.attn must be absent: the encoder has no routers for it/,
  );
});

describe('settings and files', () => {
  it('that cannot be are refused with what there is', async () => {
    const { dir } = await modularDirectory('t5', [], undefined, (base) => ({
      routing: someRouting(specOf(base), allModules(specOf(base))),
    }));
    await using model = await loadModel(dir);
    const at = (tokenCapacity: unknown) => () =>
      model.resolve({ spec: { assembly, tokenCapacity: tokenCapacity as never } });
    expect(at({ mlp: 0 })).toThrow(/tokenCapacity\.mlp must be in \(0, 1\] or 3 numbers in \[0, 1\]/);
    expect(at({ mlp: [0.5, 0.5, 0.5, 0.5] })).toThrow(/or 3 numbers in \[0, 1\], one for each part of the encoder/);
    expect(at({ block: 0.5 })).toThrow(/tokenCapacity takes attn, mlp of an encoder, got 'block'/);
    expect(at(0.5)).toThrow(/tokenCapacity must be an object/);
    await using plain = await loadModel((await modularDirectory('t5')).dir);
    expect(() => plain.resolve({ spec: { tokenCapacity: { mlp: 0.5 } } })).toThrow(
      /must be absent: the encoder has no routers/,
    );
  });

  it('keep levels and routers, and are read as they were written', async () => {
    const { dir, spec } = await routed('marian');
    const level = { name: 'light', spec: { assembly, tokenCapacity: { attn: 0.5, mlp: [1, 0.5, 0.5] } } };
    await writeLevels(dir, [{ name: 'full', spec: {} }, level]);
    const { policy, routers, warnings } = (await readElastic(dir))!;
    expect([policy.levels[1], warnings]).toEqual([level, []]);
    expect(policy.sourceTokens).toEqual({ layers: 4, capacity: { attn: [0.3, 1], mlp: [0.3, 1] } });
    expect(new Map(routers)).toEqual(someRouting(spec, allModules(spec)).routers);
    // Four layers and the modules 0-1, 2-3, 0-3.
    expect(routers.size).toBe(2 * 7);
    {
      using file = openSafetensors(join(dir, routerFile));
      expect(file.info('encoder.modules.2-3.mlp.token.weight').shape).toEqual([1, spec.encoder.hidden]);
    }
    await using model = await loadModel(dir);
    const { compute } = await written(model, readSeq2SeqCases('marian').sources[0], { budget: 'light' });
    expect([compute.level, compute.effective]).toEqual(['light', level.spec]);
    const bad = { name: 'odd', spec: { tokenCapacity: { mlp: [1, 1] } } };
    await expect(writeLevels(dir, [bad])).rejects.toThrow(
      /levels\[0\]\.spec\.tokenCapacity\.mlp must be in .* 4 numbers/,
    );
  });

  it('become levels of assemblies, and no stock checkpoint', async () => {
    const { dir, spec } = await routed('marian');
    const tokenCapacity = { attn: 0.7, mlp: 0.5 };
    const encoder = ['0', '1', '2-3'];
    await assemble(dir, { encoder, tokenCapacity, saveLevel: 'light', sourceTokens: 8, targetTokens: 4 });
    const { policy } = (await readElastic(dir))!;
    const level = policy.levels.find(({ name }) => name === 'light')!;
    expect(level.spec).toEqual({ assembly: { encoder, decoder: ['0', '1', '2', '3', '4', '5'] }, tokenCapacity });
    expect(level.flopsRatio).toBe(settingsRatio(spec, level.spec, policy, { source: 8, target: 4 }));
    const refused = (options: AssembleOptions) => expect(assemble(dir, options)).rejects;
    const out = join(temporaryDirectory(), 'stock');
    await refused({ encoder, tokenCapacity, out }).toThrow(/a stock checkpoint has no routers, and runs every token/);
    await refused({ encoder, tokenCapacity }).toThrow(/tokenCapacity is kept in a level, with saveLevel/);
    await refused({ encoder, tokenCapacity: { mlp: 2 }, saveLevel: 'x' }).toThrow(/tokenCapacity\.mlp must be in/);
  });

  it.each<[string, (config: Record<string, never>) => unknown, RegExp]>([
    ['no place', (c) => ({ ...c, source_tokens: {} }), /source_tokens must be some of attn, mlp/],
    [
      'a range',
      (c) => ({ ...c, source_tokens: { mlp: { train: 'top-k', decode: 'top-k', train_capacity: [0, 2] } } }),
      /source_tokens\.mlp\.train_capacity must be two ascending numbers/,
    ],
    [
      'another rule',
      (c) => ({ ...c, source_tokens: { mlp: { train: 'top-k', decode: 'threshold', train_capacity: [0.5, 1] } } }),
      /source_tokens\.mlp\.decode must be "top-k"/,
    ],
    ['routers', (c) => ({ ...c, source_tokens: undefined }), /routers\[0\]\.id must be one of/],
  ])('are refused when %s is wrong', async (_, change, message) => {
    const { dir } = await routed('marian');
    const path = join(dir, elasticConfigFile);
    writeFileSync(path, JSON.stringify(change(JSON.parse(readFileSync(path, 'utf8')))));
    await sealed(dir, elasticConfigFile);
    await expect(readElastic(dir)).rejects.toThrow(message);
  });

  it('are not written of routers that do not fit', async () => {
    const base = await deepSeq2Seq('bart');
    const modules = allModules(specOf(base));
    const routing = someRouting(specOf(base), modules);
    const write = (routers: typeof routing.routers) =>
      writeModules(temporaryDirectory(), base, {
        ...{ spec: modules, weights: copiedModules(base, modules) },
        routing: { ...routing, routers },
      });
    const id = 'encoder.modules.0-1.attn.token';
    const without = new Map([...routing.routers].filter(([name]) => name !== id));
    await expect(write(without)).rejects.toThrow(/modules\.0-1\.attn\.token must have 24 finite weights and a bias/);
    const nan = { weight: new Float32Array(24).fill(Number.NaN), bias: Float32Array.of(0) };
    await expect(write(new Map([...routing.routers, [id, nan]]))).rejects.toThrow(/must have 24 finite weights/);
  });
});
