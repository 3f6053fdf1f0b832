// Assemblies written as stock checkpoints, against transformers and tensor by tensor, how they are chosen, and what is refused.
import { execFileSync } from 'node:child_process';
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, it, test } from 'vitest';
import { writeModules } from '../../lib/elastic/elastify.js';
import { type Assembly, assemblyPath, assemblyText, type Modules, spansOf } from '../../lib/elastic/modules.js';
import { type AssembleOptions, assemble } from '../../lib/infer/export/assemble.js';
import { loadModel } from '../../lib/infer/model.js';
import { seq2seqParameters } from '../../lib/model/seq2seq_weights.js';
import { largestDifference, readSeq2SeqCases, readVectors, seq2seqDirectory, seq2seqNames } from '../model/golden.js';
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
  tensorsOf,
  writeLayers,
  writeMerged,
  writeNarrow,
} from './modules.js';

const whole = (dir: string) => {
  const { encoder, decoder } = specOf(dir);
  return tensorsOf(dir, { encoder: [...Array(encoder.layers).keys()], decoder: [...Array(decoder.layers).keys()] });
};
const refusal = (call: () => Promise<unknown>) =>
  call().then(
    () => null,
    (error: Error & { code: string }) => error,
  );

/** A model twice as deep as a golden one, whose modules of two layers are the golden one's layers. */
async function goldenModules(name: string): Promise<{ dir: string; modules: Modules; pairs: Assembly }> {
  const golden = seq2seqDirectory(name);
  const { encoder, decoder } = specOf(golden);
  const base = await deepSeq2Seq(name, { encoder: 2 * encoder.layers, decoder: 2 * decoder.layers });
  const modules = { encoder: spansOf(2 * encoder.layers, [2]), decoder: spansOf(2 * decoder.layers, [2]) };
  const dir = temporaryDirectory();
  await writeModules(dir, base, { spec: modules, weights: copiedModules(golden, modules, ({ first }) => first / 2) });
  const ids = (spans: Modules['encoder']) => spans.map(({ first, last }) => `${first}-${last}`);
  return { dir, modules, pairs: { encoder: ids(modules.encoder), decoder: ids(modules.decoder) } };
}

describe.each(seq2seqNames)('%s', (name) => {
  it('written from modules is the golden model again, which transformers has run', async () => {
    const { dir, pairs } = await goldenModules(name);
    const out = join(temporaryDirectory(), 'stock');
    const { written, chosen } = await assemble(dir, { ...pairs, out });
    expect(chosen!.assembly).toEqual(pairs);
    expect(written).toMatchObject({
      dir: out,
      texts: 3,
      largestDifference: 0,
      loadsIn: ['elastiform', 'transformers', expect.anything()],
    });
    const golden = seq2seqDirectory(name);
    expect(whole(out)).toEqual(whole(golden));
    expect(JSON.parse(readFileSync(join(out, 'config.json'), 'utf8'))).toEqual(
      JSON.parse(readFileSync(join(golden, 'config.json'), 'utf8')),
    );
    const { sources, special, generations } = readSeq2SeqCases(name);
    writeFileSync(join(out, 'generation_config.json'), JSON.stringify({ ...special, max_length: 12 }));
    await using model = await loadModel(out);
    for (const { source, settings, ids } of generations) {
      if (JSON.stringify(settings) !== '{"max_length":12}') continue;
      expect(await model.generate(sources[source]).ids).toEqual(ids);
    }
    const vectors = readVectors(join(golden, 'seq2seq.safetensors'));
    const { targets } = readSeq2SeqCases(name);
    const logits = await model.seq2seq.logits(sources[0], targets[0], { budget: 'full' });
    expect(largestDifference(logits, vectors['logits.0'])).toBeLessThan(1e-4);
  });
});

describe('a stock checkpoint', () => {
  it.each(['bart', 't5-gated'])('has the layers that stay and the modules, in their order: %s', async (name) => {
    const { dir, base } = await modularDirectory(name);
    const assembly: Assembly = { encoder: ['0-1', '2', '3'], decoder: ['0', '1', '2', '3-5'] };
    const out = temporaryDirectory();
    const { written } = await assemble(dir, { ...assembly, out });
    const oracle = await writeLayers(base, temporaryDirectory(), layersOf(assembly));
    expect(whole(out)).toEqual(whole(oracle));
    expect(specOf(out)).toEqual(specOf(oracle));
    const files = ['README.md', 'config.json', 'generation_config.json', 'model.safetensors'];
    expect(readdirSync(out).sort()).toEqual(files);
    expect(readFileSync(join(out, 'README.md'), 'utf8')).toContain('decoder 0, 1, 2, 3-5');
    expect(written!.bytes).toBeGreaterThan(1000);
    // A stack that is not listed stays whole.
    const only = await assemble(dir, { decoder: ['0-5'], out: temporaryDirectory() });
    expect(only.chosen!.assembly).toEqual({ encoder: ['0', '1', '2', '3'], decoder: ['0-5'] });
  });

  it.each(['marian', 't5-gated'])('has as many units as were asked for, to the bit: %s', async (name) => {
    const evened = (base: string) => writeNarrow(base, temporaryDirectory(), 32);
    const { dir, base } = await modularDirectory(name, [], evened, () => ({ nested: nestedAt([0.5, 1], 4) }));
    const assembly: Assembly = { encoder: ['0-1', '2', '3'], decoder: ['0', '1', '2', '3-5'] };
    const out = temporaryDirectory();
    const { chosen, written } = await assemble(dir, { ...assembly, ffnWidth: 0.5, out });
    expect(written).toMatchObject({ texts: 3, largestDifference: 0 });
    expect(chosen).toMatchObject({ assembly, ffnWidth: 0.5 });
    const layers = await writeLayers(base, temporaryDirectory(), layersOf(assembly));
    const oracle = await writeNarrow(layers, temporaryDirectory(), 16);
    expect(whole(out)).toEqual(whole(oracle));
    expect(specOf(out)).toEqual(specOf(oracle));
    expect(chosen!.parameters).toBe(seq2seqParameters(specOf(oracle), name === 't5-gated'));
    expect(readFileSync(join(out, 'README.md'), 'utf8')).toContain('Feed-forwards have 16 units.');
    // All layers, narrower.
    const all = await assemble(dir, { ffnWidth: 16, saveLevel: 'half' });
    expect(all.chosen!.assembly).toEqual(all.path[0].assembly);
    expect(all.path.map(({ ffnWidth }) => ffnWidth)).toEqual([1, ...all.path.slice(1).map(() => 0.5)]);
    expect(all.path[1].assembly).toEqual(all.path[0].assembly);
    expect(all.path[1].speedup).toBeGreaterThan(1);
    await using model = await loadModel(dir);
    expect(model.resolve('half').spec).toEqual({ ffnWidth: 0.5 });
  });

  it.each(['bart', 't5'])('has the corrections of layers in their weights: %s', async (name) => {
    const { dir, base } = await modularDirectory(name, [], undefined, (from) => ({ lora: correctionsOf(from) }));
    const assembly: Assembly = { encoder: ['0', '1', '2-3'], decoder: ['0-1', '2', '3', '4', '5'] };
    const out = temporaryDirectory();
    const { written } = await assemble(dir, { ...assembly, out });
    expect(written!.texts).toBe(3);
    expect(written!.largestDifference).toBeGreaterThan(0);
    expect(written!.largestDifference).toBeLessThan(1e-4);
    expect(readFileSync(join(out, 'README.md'), 'utf8')).toContain('corrections of the layers are merged in');
    // Modules are copies of the last layers of their spans, as these were.
    const own = correctionsOf(base);
    const modules = ['encoder.layers.3.', 'decoder.layers.1.'];
    const matrices = new Map([...own.matrices].filter(([id]) => !modules.some((module) => id.startsWith(module))));
    const merged = await writeMerged(base, temporaryDirectory(), { matrices });
    expect(whole(out)).toEqual(tensorsOf(merged, layersOf(assembly)));
    // All layers are the backbone.
    const backbone = temporaryDirectory();
    const { path } = await assemble(dir);
    const same = await assemble(dir, { ...path[0].assembly, out: backbone });
    expect(same.written!.largestDifference).toBe(0);
    expect(whole(backbone)).toEqual(whole(base));
  });

  it('with corrections in weights of 16 bits is near', async () => {
    const { dir } = await modularDirectory('t5', [], halved, (from) => ({ lora: correctionsOf(from) }));
    const { written } = await assemble(dir, { decoder: ['0-1', '2', '3', '4', '5'], out: temporaryDirectory() });
    expect(written!.largestDifference).toBeGreaterThan(0);
  });

  it('is in the element type of the model', async () => {
    const { dir, base } = await modularDirectory('marian', [], halved);
    const out = temporaryDirectory();
    const { written } = await assemble(dir, { speedup: 1.4, out });
    expect(written!.texts).toBe(3);
    expect(new Set(Object.values(whole(out)).map(({ dtype }) => dtype))).toEqual(new Set(['bf16']));
    expect(Object.keys(whole(out)).length).toBeLessThan(Object.keys(whole(base)).length);
  });

  it('is not left behind where it is not what the assembly computes, or work is stopped', async () => {
    const { dir } = await modularDirectory('bart');
    const out = join(temporaryDirectory(), 'out');
    const stop = new AbortController();
    const stopped = assemble(dir, {
      ...{ decoder: ['0-5'], out, signal: stop.signal },
      onProgress: ({ phase, done }) => phase === 'writing tensors' && done > 3 && stop.abort(new Error('enough')),
    });
    await expect(stopped).rejects.toThrow('enough');
    expect(readdirSync(join(out, '..'))).toEqual([]);
  });
});

describe('a choice', () => {
  it('is the costliest that keeps what was asked for', async () => {
    const { dir, base } = await modularDirectory('t5');
    const spec = specOf(base);
    const modules = allModules(spec);
    const { path, chosen, written } = await assemble(dir);
    expect([chosen, written]).toEqual([null, null]);
    expect(path.map(({ assembly }) => assembly)).toEqual(assemblyPath(spec, modules, 'speed-first'));
    expect(path[0]).toEqual({
      ...{ assembly: path[0].assembly, ffnWidth: 1, parameters: seq2seqParameters(spec) },
      ...{ flopsRatio: 1, speedup: 1, ms: null },
    });
    for (const [i, { flopsRatio, parameters, speedup }] of path.entries()) {
      if (i === 0) continue;
      expect(flopsRatio).toBeLessThan(path[i - 1].flopsRatio);
      expect(parameters).toBeLessThan(path[i - 1].parameters);
      expect(speedup).toBeGreaterThan(path[i - 1].speedup);
      const fits = await assemble(dir, { speedup });
      expect(fits.chosen).toEqual({ ...path[i] });
    }
    const sizes = (await assemble(dir, { size: 1 })).path;
    expect(sizes.map(({ assembly }) => assembly)).toEqual(assemblyPath(spec, modules, 'size-first'));
    for (const cost of sizes) {
      const size = (cost.parameters + 0.5) / sizes[0].parameters;
      if (size <= 1) expect((await assemble(dir, { size })).chosen).toEqual(cost);
    }
    // Where tokens are written one by one, the decoder's layers are what takes time, but for the head.
    const { hidden, vocab, layers } = spec.decoder;
    const head = (hidden * vocab) / (seq2seqParameters(spec) / 2);
    expect(path[5].assembly.decoder.length).toBe(1);
    expect(path[5].speedup).toBeGreaterThan(0.8 * layers * (1 - head));
    expect(path[5].speedup).toBeLessThan(layers);
    // Sources count: longer ones make the encoder's share larger.
    const long = await assemble(dir, { sourceTokens: 500, targetTokens: 4 });
    expect(long.path[3].flopsRatio).toBeGreaterThan(path[3].flopsRatio);
  });

  it('by measured time is of what was timed, is kept for budgets, and as a level', async () => {
    const { dir } = await modularDirectory('bart');
    const lengths = { sourceTokens: 10, targetTokens: 6 };
    const events: string[] = [];
    const { path, chosen } = await assemble(dir, {
      ...{ ...lengths, latencyMs: 60_000, record: true, saveLevel: 'slow' },
      onProgress: ({ phase, done, total }) => events.push(`${phase} ${done} ${total}`),
    });
    expect(path.every(({ ms }) => ms! > 0)).toBe(true);
    // Whatever is allowed a minute is the whole model.
    expect(chosen).toEqual(path[0]);
    expect(events).toContain('timing assemblies 5 6');
    await using model = await loadModel(dir);
    expect(model.resolve({ latencyMs: 60_000 }, { length: 12, maxTokens: 4 }).full).toBe(true);
    const stored = readdirSync(join(dir, 'profiles'));
    expect(stored.length).toBe(1);
    const profile = JSON.parse(readFileSync(join(dir, 'profiles', stored[0]), 'utf8'));
    expect(profile.lengths).toEqual([8, 10]);
    expect(profile.levels.map(({ level }: { level: string }) => level)).toContain('encoder=0-3;decoder=0-5');
    // Times as they might be: every assembly half as long as the one before.
    const texts = path.map(({ assembly }) => assemblyText(assembly));
    for (const level of profile.levels) {
      const at = Math.max(0, texts.indexOf(level.level));
      level.prefillMs = [64 / 2 ** at, 64 / 2 ** at];
      level.decodeMs = level.prefillMs;
    }
    writeFileSync(join(dir, 'profiles', stored[0]), JSON.stringify(profile));
    await using again = await loadModel(dir);
    const { compute } = await again.generate([5, 4, 2], { maxTokens: 3, budget: { latencyMs: 25 } }).usage;
    // Three tokens by the fourth of the path take 3 times 8 ms, by the third 48.
    expect(compute.effective.assembly).toEqual(path[3].assembly);
    expect(() => again.generate([5, 4, 2], { maxTokens: 3, budget: { latencyMs: 1e-3 } })).toThrow(/no level keeps/);

    const { chosen: half } = await assemble(dir, { decoder: ['0-1', '2-3', '4-5'], saveLevel: 'half' });
    await using levelled = await loadModel(dir);
    expect(levelled.info.levels.map(({ name }) => name)).toEqual(['full', 'slow', 'half']);
    expect(levelled.resolve('half').spec).toEqual({ assembly: half!.assembly });
    expect(levelled.info.levels[2].flopsRatio).toBe(half!.flopsRatio);
  });

  it.each<[AssembleOptions, RegExp]>([
    [{ speedup: 50 }, /no assembly has a speed-up of 50: the smallest, encoder=0-3;decoder=0-5, has \d\.\d\d/],
    [{ size: 0.01 }, /no assembly has 0.01 of the parameters: the smallest, .* has 0\.\d+ of them/],
    [{ latencyMs: 1e-6, sourceTokens: 2, targetTokens: 1 }, /no assembly has 0.000001 ms: .* takes .* on this device/],
    [{ speedup: 2, size: 0.5 }, /choose by one of them, got speedup and size/],
    [{ speedup: 2, decoder: ['0-5'] }, /got speedup and encoder and decoder/],
    [{ speedup: 0.5 }, /speedup must be at least 1/],
    [{ size: 2 }, /size must be in \(0, 1\]/],
    [{ sourceTokens: 0 }, /sourceTokens must be a positive integer/],
    [{ measure: true, sourceTokens: 999_999 }, /the context holds/],
    [{ out: 'x' }, /which assembly\? Give speedup, size, latencyMs/],
    [{ speedup: 1.1, saveLevel: 'full' }, /saveLevel must be a name/],
    [{ decoder: ['0-2', '4', '5'] }, /decoder has a gap: layer 3 is missing before 4/],
    [{ decoder: ['0-2', '2', '3-5'] }, /decoder has an overlap/],
    [{ encoder: ['0-2', '3'] }, /encoder has 0-2, which the model lacks/],
    [{ ffnWidth: 0.5 }, /ffnWidth must be absent: no feed-forward of this model is nested/],
    [{ ffnWidth: 1, record: true }, /record keeps times of whole feed-forwards/],
    [{ colour: 1 } as AssembleOptions, /unknown option 'colour'/],
  ])('%j is refused', async (options, message) => {
    const { dir } = await modularDirectory('t5');
    const error = await refusal(() => assemble(dir, options));
    expect([error?.code, error?.message]).toEqual(['InvalidArgument', expect.stringMatching(message)]);
  });

  it('needs modules, and a place to write', async () => {
    const base = await deepSeq2Seq('bart');
    expect((await refusal(() => assemble(base, { speedup: 2 })))?.message).toMatch(/has no modules; train them/);
    const llama = join(seq2seqDirectory('bart'), '..', '..', 'llama-gqa');
    expect((await refusal(() => assemble(llama)))?.message).toMatch(/modules are of encoder-decoder models/);
    const { dir } = await modularDirectory('bart');
    const used = (await refusal(() => assemble(dir, { speedup: 1.1, out: base })))?.message;
    expect(used).toMatch(/out must be a new or empty directory/);
  });
});

// A Python with transformers, when one is at hand: `ELASTIFORM_PYTHON=/path/to/python npm test`.
const python = process.env.ELASTIFORM_PYTHON;
if (python) {
  test.each(seq2seqNames)(
    'transformers loads what is written: %s',
    async (name) => {
      const evened = (base: string) => writeNarrow(base, temporaryDirectory(), 32);
      const { dir } = await modularDirectory(name, [], evened, (base) => ({
        ...{ nested: nestedAt([0.5, 1], 4), lora: correctionsOf(base) },
      }));
      const out = temporaryDirectory();
      await assemble(dir, { encoder: ['0-1', '2', '3'], decoder: ['0-2', '3', '4-5'], ffnWidth: 0.75, out });
      const { sources, targets } = readSeq2SeqCases(name);
      const script = fileURLToPath(new URL('../../scripts/golden/seq2seq_texts.py', import.meta.url));
      const asked = [out, JSON.stringify(sources), JSON.stringify(targets[0])];
      const theirs = JSON.parse(
        execFileSync(python, [script, ...asked], { encoding: 'utf8' })
          .trim()
          .split('\n')
          .at(-1)!,
      );
      expect(theirs.wrong).toEqual([[], [], []]);
      await using model = await loadModel(out);
      const { startId } = model.seq2seq.network.settings;
      for (const [i, source] of sources.entries()) {
        expect([startId, ...(await model.generate(source, { beams: 1 }).ids)]).toEqual(theirs.texts[i]);
      }
      const logits = await model.seq2seq.logits(sources[0], targets[0], { budget: 'full' });
      expect(largestDifference(logits, theirs.logits)).toBeLessThan(1e-4);
    },
    120_000,
  );
}
