// Modules of encoder-decoder models on disk, written and read back, refused with a reason when anything is wrong, and the paths of assemblies.
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { policyFromJson, policyToJson } from '../../lib/elastic/config.js';
import { writeModules } from '../../lib/elastic/elastify.js';
import {
  type Assembly,
  assemblyPath,
  assemblyProblem,
  assemblyText,
  backboneOf,
  ladder,
  type Modules,
  spansOf,
} from '../../lib/elastic/modules.js';
import { elasticConfigFile, readElastic, routerFile, writeLevels } from '../../lib/elastic/store.js';
import { sha256File } from '../../lib/io/files.js';
import { openSafetensors, type TensorData, writeSafetensors } from '../../lib/io/safetensors.js';
import { seq2seqModuleSlots } from '../../lib/model/seq2seq_weights.js';
import { allModules, copiedModules, deepSeq2Seq, halved, modularDirectory, sealed, specOf } from '../infer/modules.js';
import { goldenDirectory } from '../model/golden.js';
import { temporaryDirectory } from '../temporary.js';

const refusal = (call: () => Promise<unknown>) =>
  call().then(
    () => null,
    (error: Error & { code: string }) => error,
  );

const few: Modules = { encoder: spansOf(4, [2]), decoder: spansOf(6, [3, 6]) };
let base: string;
beforeAll(async () => {
  base = await deepSeq2Seq('t5');
});

describe('an elastic directory with modules', () => {
  it.each(['bart', 't5-gated'])('reads back what was written, over the same checkpoint: %s', async (name) => {
    const from = await deepSeq2Seq(name);
    const spec = specOf(from);
    const weights = copiedModules(from, few);
    const dir = temporaryDirectory();
    const fast: Assembly = { encoder: ['0', '1', '2-3'], decoder: ['0-5'] };
    await writeModules(dir, from, { spec: few, weights }, [{ name: 'fast', spec: { assembly: fast } }]);
    const { policy, warnings, routers } = (await readElastic(dir))!;
    expect(policy.modules).toEqual(few);
    expect(policy.levels).toEqual([
      { name: 'full', spec: {} },
      { name: 'fast', spec: { assembly: fast } },
    ]);
    expect([warnings, routers.size]).toEqual([[], 0]);
    expect(JSON.parse(readFileSync(join(dir, elasticConfigFile), 'utf8')).modules).toEqual({
      encoder: ['0-1', '2-3'],
      decoder: ['0-2', '3-5', '0-5'],
    });
    const stored = () => {
      using file = openSafetensors(join(dir, routerFile));
      return new Map(file.names().map((tensor) => [tensor, file.tensor(tensor).readFloat()]));
    };
    expect(stored()).toEqual(new Map([...weights].sort(([a], [b]) => (a < b ? -1 : 1))));
    using file = openSafetensors(join(dir, routerFile));
    const { hidden, heads, headDim } = spec.decoder;
    expect(file.info('decoder.modules.3-5.cross.q.weight')).toMatchObject({
      dtype: 'F32',
      shape: [heads * headDim, hidden],
    });
    expect(file.info('encoder.modules.2-3.up.weight').shape).toEqual([spec.encoder.ffn, hidden]);
    expect(file.has('encoder.modules.2-3.cross.q.weight')).toBe(false);
    for (const one of ['model.safetensors', 'config.json'])
      expect(await sha256File(join(dir, one))).toBe(await sha256File(join(from, one)));
    // Levels are replaced with the modules as they are.
    const levels = [{ name: 'full', spec: {} }];
    await writeLevels(dir, levels);
    expect((await readElastic(dir))!.policy.levels).toEqual(levels);
    expect(stored().size).toBe(weights.size);
    expect(stored().get('decoder.modules.0-5.down.weight')).toEqual(weights.get('decoder.modules.0-5.down.weight'));
  });

  it('names every weight as that of a layer, in the same shape', () => {
    const spec = specOf(base);
    const slots = seq2seqModuleSlots(spec, allModules(spec));
    expect(new Set(slots.map(({ name }) => name)).size).toBe(slots.length);
    // Of encoder layers 0-1, 2-3, 0-3, and of decoder layers three pairs, two triples and all six.
    const each = (stack: string, of: string) => slots.filter(({ name }) => name.startsWith(`${stack}.modules.${of}.`));
    expect(slots.length).toBe(3 * each('encoder', '0-1').length + 6 * each('decoder', '0-5').length);
    expect(each('decoder', '2-3').find(({ name }) => name.endsWith('cross.norm.weight'))).toMatchObject({
      init: 'one',
      file: { name: 'decoder.block.3.layer.1.layer_norm.weight' },
    });
  });

  it('is stored in the element type of the checkpoint', async () => {
    const dir = temporaryDirectory();
    await writeModules(dir, await halved(base), { spec: few, weights: copiedModules(base, few) });
    using file = openSafetensors(join(dir, routerFile));
    expect(new Set(file.names().map((name) => file.info(name).dtype))).toEqual(new Set(['BF16']));
    expect((await readElastic(dir))!.policy.modules).toEqual(few);
  });
});

describe('bad modules', () => {
  it.each<[string, (weights: Map<string, Float32Array>) => unknown, RegExp]>([
    [
      'a weight that is missing',
      (w) => w.delete('decoder.modules.0-5.cross.k.weight'),
      /0-5\.cross\.k\.weight must be/,
    ],
    ['a weight of another size', (w) => w.set('encoder.modules.0-1.o.weight', new Float32Array(3)), /must be .* got 3/],
    ['what is not finite', (w) => w.get('encoder.modules.2-3.norm2.weight')!.fill(Number.NaN), /must be .* finite/],
    ['a weight of no module', (w) => w.set('decoder.modules.0-1.o.weight', new Float32Array(3)), /weight of no module/],
  ])('are not written: %s', async (_, change, message) => {
    const weights = copiedModules(base, few);
    change(weights);
    const error = await refusal(() => writeModules(temporaryDirectory(), base, { spec: few, weights }));
    expect([error?.code, error?.message]).toEqual(['InvalidArgument', expect.stringMatching(message)]);
  });

  it('of spans that do not fit, or of a model that is no encoder-decoder, are not written', async () => {
    const write = (decoder: Modules['decoder'], from = base) =>
      refusal(() => writeModules(temporaryDirectory(), from, { spec: { encoder: [], decoder }, weights: new Map() }));
    expect((await write([{ first: 1, last: 2 }]))?.message).toMatch(/modules\.decoder\[0\] must be of a span/);
    expect((await write([{ first: 0, last: 3 }]))?.message).toMatch(/size divides 6 layers/);
    expect((await write([{ first: 6, last: 8 }]))?.message).toMatch(/must be of a span/);
    expect((await write([]))?.message).toMatch(/modules must be at least one span/);
    const error = await write([{ first: 0, last: 1 }], join(goldenDirectory, 'llama-gqa'));
    expect(error?.message).toMatch(/modules are for encoder-decoder models/);
  });

  it.each<[string, (config: Record<string, never>) => unknown, RegExp]>([
    ['no list', (c) => ({ ...c, modules: { encoder: [], decoder: 3 } }), /modules\.decoder must be a list/],
    ['twice', (c) => ({ ...c, modules: { encoder: [], decoder: ['0-2', '0-2'] } }), /decoder\[1\] must be .* once/],
    ['a layer', (c) => ({ ...c, modules: { encoder: ['1'], decoder: [] } }), /encoder\[0\] must be of a span/],
    ['no id', (c) => ({ ...c, modules: { encoder: ['1-0'], decoder: [] } }), /encoder\[0\] must be a span of layers/],
    [
      'none',
      ({ modules: _, ...c }) => c,
      /an encoder-decoder model has modules, nested feed-forwards, lora and source_tokens, and no other routers/,
    ],
    [
      'a level with a gap',
      (c) => ({ ...c, levels: [{ name: 'x', spec: { assembly: { encoder: ['0-1', '2-3'], decoder: ['3-5'] } } }] }),
      /levels\[0\]\.spec\.assembly must be parts that cover every layer once: decoder has a gap: layers 0 to 2/,
    ],
    [
      'corrections of some layers',
      (c) => ({ ...c, lora: { rank: 2, targets: ['q'], layers: [0] } }),
      /are of all its layers/,
    ],
  ])('in elastic_config.json are refused: %s', async (_, change, message) => {
    const dir = temporaryDirectory();
    await writeModules(dir, base, { spec: few, weights: copiedModules(base, few) });
    const path = join(dir, elasticConfigFile);
    writeFileSync(path, JSON.stringify(change(JSON.parse(readFileSync(path, 'utf8')))));
    await sealed(dir, elasticConfigFile);
    const error = await refusal(() => readElastic(dir));
    expect([error?.code, error?.message]).toEqual(['InvalidData', expect.stringMatching(message)]);
    expect(error?.message).toContain(elasticConfigFile);
  });

  it.each<[string, (tensors: Record<string, TensorData>) => unknown, RegExp]>([
    [
      'no cross-attention in a decoder',
      (t) => delete t['decoder.modules.0-5.cross.q.weight'],
      /tensor decoder\.modules\.0-5\.cross\.q\.weight is missing/,
    ],
    [
      'another shape',
      (t) =>
        Object.assign(t, {
          'encoder.modules.0-1.norm1.weight': { dtype: 'f32', shape: [2], data: new Float32Array(2) },
        }),
      /encoder\.modules\.0-1\.norm1\.weight must be \[24\] of F32, BF16, F16, got F32\[2\]/,
    ],
    [
      'integers',
      (t) =>
        Object.assign(t, {
          'encoder.modules.0-1.norm1.weight': { dtype: 'i32', shape: [24], data: new Int32Array(24) },
        }),
      /must be \[24\] of F32, BF16, F16, got I32\[24\]/,
    ],
    [
      'a tensor of no module',
      (t) => Object.assign(t, { 'decoder.modules.0-1.x': { dtype: 'f32', shape: [1], data: new Float32Array(1) } }),
      /belongs to no router, exit or module/,
    ],
  ])('in the file of weights are refused: %s', async (_, change, message) => {
    const dir = temporaryDirectory();
    await writeModules(dir, base, { spec: few, weights: copiedModules(base, few) });
    const path = join(dir, routerFile);
    const tensors = (() => {
      using file = openSafetensors(path);
      return Object.fromEntries(
        file.names().map((name) => {
          const tensor = file.tensor(name);
          return [name, { dtype: tensor.dtype, shape: tensor.shape, data: tensor.read() }];
        }),
      );
    })();
    change(tensors);
    await writeSafetensors(path, tensors);
    await sealed(dir, routerFile);
    const error = await refusal(() => readElastic(dir));
    expect([error?.code, error?.message]).toEqual(['InvalidData', expect.stringMatching(message)]);
  });

  it('have no place in the configuration of a decoder', async () => {
    const dir = await modularDirectory('bart');
    const { policy } = (await readElastic(dir.dir))!;
    const json = JSON.parse(JSON.stringify(policyToJson(policy)));
    expect(() => policyFromJson(json, 'f.json', specOf(dir.base).decoder, [])).toThrow(/modules must be absent/);
  });
});

describe('an assembly', () => {
  const sizes = { encoder: { layers: 4 }, decoder: { layers: 6 } };
  const problem = (assembly: unknown, modules: Modules | undefined = few) => assemblyProblem(assembly, sizes, modules);
  const encoder = ['0', '1', '2', '3'];
  it('covers every layer once with parts that are there', () => {
    expect(problem(backboneOf(sizes))).toBeNull();
    expect(problem({ encoder: ['0-1', '2', '3'], decoder: ['0', '1', '2', '3-5'] })).toBeNull();
    expect(assemblyText({ encoder: ['0-1', '2', '3'], decoder: ['0-5'] })).toBe('encoder=0-1,2,3;decoder=0-5');
  });
  it.each<[unknown, RegExp]>([
    [{ encoder, decoder: ['0-2', '4', '5'] }, /decoder has a gap: layer 3 is missing before 4; there are the layers/],
    [
      { encoder, decoder: ['0-2'] },
      /decoder has a gap: layers 3 to 5 are missing at its end; .* modules 0-2, 3-5, 0-5/,
    ],
    [{ encoder: [], decoder: ['0-5'] }, /encoder has a gap: layers 0 to 3 are missing at its end/],
    [{ encoder, decoder: ['0-2', '2', '3-5'] }, /decoder has an overlap: 2 comes after layer 2 is covered/],
    [{ encoder: ['0-1', '1', '2-3'], decoder: ['0-5'] }, /encoder has an overlap: 1 comes after layer 1 is covered/],
    [{ encoder, decoder: ['0-1', '2-3', '4-5'] }, /decoder has 0-1, which the model lacks; .* 0-2, 3-5, 0-5/],
    [{ encoder: ['0', '1', '2', '3', '4'], decoder: ['0-5'] }, /encoder has 4, which the model lacks/],
    [{ encoder: ['0', 1], decoder: ['0-5'] }, /encoder has 1, which names no part/],
    [{ encoder: ['00', '1', '2-3'], decoder: ['0-5'] }, /encoder has "00", which names no part/],
    [{ encoder: '0-3', decoder: ['0-5'] }, /encoder must be a list of parts/],
    [{ decoder: ['0-5'] }, /^\{ encoder, decoder \}, each a list/],
    [null, /^\{ encoder, decoder \}/],
  ])('%j is refused', (assembly, message) => expect(problem(assembly)).toMatch(message));
  it('needs modules', () => {
    expect(assemblyProblem(backboneOf(sizes), sizes, undefined)).toMatch(/the model has no modules/);
  });
});

describe('paths', () => {
  const six = spansOf(6, [2, 3, 6]);
  it('a ladder has the best assembly of every number of parts', () => {
    const texts = ladder(6, six).map((parts) => parts.join(' '));
    expect(texts).toEqual(['0 1 2 3 4 5', '0 1 2 3 4-5', '0 1 2-3 4-5', '0-1 2-3 4-5', '0-2 3-5', '0-5']);
    expect(ladder(4, [])).toEqual([['0', '1', '2', '3']]);
    // The same as the best of all assemblies, one by one.
    const twelve = spansOf(12, [2, 3, 4, 6, 12]);
    const all = (first: number): string[][] =>
      first === 12
        ? [[]]
        : [{ first, last: first }, ...twelve.filter((span) => span.first === first)].flatMap(({ last }) =>
            all(last + 1).map((rest) => [last > first ? `${first}-${last}` : `${first}`, ...rest]),
          );
    const saved = (part: string) => {
      const [first, last = first] = part.split('-').map(Number);
      return last - first;
    };
    const cost = (parts: string[]) => parts.reduce((sum, part) => sum + saved(part) ** 2, 0);
    const found = ladder(12, twelve);
    const counts = [...new Set(all(0).map(({ length }) => length))].sort((a, b) => b - a);
    expect(found.map(({ length }) => length)).toEqual(counts);
    for (const parts of found) {
      const least = Math.min(
        ...all(0)
          .filter(({ length }) => length === parts.length)
          .map(cost),
      );
      expect(cost(parts)).toBe(least);
    }
  });

  it('shrink the decoder first for speed, and both stacks for size', () => {
    const sizes = { encoder: { layers: 4 }, decoder: { layers: 6 } };
    const modules = { encoder: spansOf(4, [2, 4]), decoder: six };
    for (const strategy of ['speed-first', 'size-first'] as const) {
      const path = assemblyPath(sizes, modules, strategy);
      expect(path[0]).toEqual(backboneOf(sizes));
      expect(path.at(-1)).toEqual({ encoder: ['0-3'], decoder: ['0-5'] });
      for (const assembly of path) expect(assemblyProblem(assembly, sizes, modules)).toBeNull();
      const counts = path.map(({ encoder, decoder }) => `${encoder.length}+${decoder.length}`).join(' ');
      expect(counts).toBe(
        strategy === 'speed-first' ? '4+6 4+5 4+4 4+3 4+2 4+1 3+1 2+1 1+1' : '4+6 4+5 3+5 3+4 2+4 2+3 2+2 1+2 1+1',
      );
    }
  });
});
