// bf16 activations: close to f32, exact where they must be, half the memory, and not for the CPU.
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { Graph, linear, linearGated, Program } from '../../lib/graph/index.js';
import { lower } from '../../lib/graph/lowering.js';
import { loadModel } from '../../lib/infer/model.js';
import { CompiledProgram, Engine, InvalidArgumentError, Tensor } from '../../lib/native/index.js';
import { goldenDirectory, goldenNames, largestDifference, readVectors } from '../model/golden.js';
import { elasticDirectories } from './fixture.js';

const load = (directory: string) => loadModel(directory, { dtype: 'bf16', activations: 'bf16' });

/** Two products, with an intermediate result that may be narrow. */
function products(): Graph {
  const graph = new Graph();
  const w = (n: number, k: number) =>
    graph.weight(
      Tensor.fromData(
        'bf16',
        [n, k],
        Uint16Array.from({ length: n * k }, (_, i) => 0x3f80 + (i % 64)),
      ),
    );
  const x = graph.feed('x', 'f32', [graph.dim('rows', 1000), 64]);
  graph.output('y', linear(linearGated(x, w(256, 64), w(256, 64), { act: 'silu' }), w(8, 256)));
  return graph;
}

test('the CPU refuses them, and programs for them', async () => {
  expect(() => new Engine('cpu', { activations: 'bf16' })).toThrow(InvalidArgumentError);
  expect(() => new Engine('cpu', { activations: 'f16' as 'bf16' })).toThrow(/must be one of f32, bf16, got f16/);
  await expect(loadModel(join(goldenDirectory, 'llama-tied'), { device: 'cpu', activations: 'bf16' })).rejects.toThrow(
    /activations must be f32 on the CPU/,
  );
  const { code, attrs, opNames, tensors, dims } = lower(products());
  using program = new CompiledProgram(code, attrs, opNames, tensors as Tensor[], 'bf16');
  using engine = new Engine('cpu');
  const sizes = Int32Array.from(dims, (dim) => dim?.bound ?? 0);
  await expect(engine.run(program, sizes, [new Float32Array(64000)])).rejects.toThrow(/not for the CPU/);
});

const device = process.env.ELASTIFORM_DEVICE ?? 'cpu';
if (device !== 'cpu') {
  test('temporaries take half the memory', () => {
    using wide = new Engine();
    using narrow = new Engine(undefined, { activations: 'bf16' });
    expect(Program.compile(products(), narrow).arenaBytes).toBe(Program.compile(products(), wide).arenaBytes / 2);
  });

  test.each(goldenNames('golden.safetensors'))('%s has nearly the logits of transformers', async (name) => {
    const golden = readVectors(join(goldenDirectory, name, 'golden.safetensors'));
    await using model = await load(join(goldenDirectory, name));
    const ids = golden.ids.slice(0, golden.offsets[1]) as Int32Array;
    const logits = await model.logits(Array.from(ids));
    const wanted = golden.logits.slice(0, logits.length) as Float32Array;
    const largest = wanted.reduce((most, v) => Math.max(most, Math.abs(v)), 0);
    // Gemma normalises what sub-layers add, too, and so carries rounding on: in bf16 transformers itself is 0.043 (gemma) and
    // 0.076 (gemma3) of the largest logit away from its f32.
    expect(largestDifference(logits, wanted)).toBeLessThan((name.startsWith('gemma') ? 0.06 : 0.03) * largest);
  });

  test('full budget is the backbone, bit for bit, whatever the batch', async () => {
    const directories = await elasticDirectories();
    await using model = await load(directories.elastic);
    await using backbone = await load(directories.backbone);
    const ids = model.network.tokenizer!.encode('The cat saw the dog by the lake. The dog ran.');
    const logits = await backbone.logits(ids);
    expect(await model.logits(ids, { budget: 1 })).toEqual(logits);
    // A row's result does not depend on the rows after it.
    const some = await backbone.logits(ids.slice(0, -3));
    expect(some).toEqual(logits.slice(0, some.length));
    const { compute } = await model.generate(ids, { maxTokens: 4, budget: 0.7 }).usage;
    expect(compute.ratio).toBeLessThan(1);
    // Drafted tokens are verified by several rows at once.
    const drafted = model.generate(ids, { maxTokens: 12, speculative: { draft: 0.7, tokens: 3 } });
    expect(await drafted.ids).toEqual(await model.generate(ids, { maxTokens: 12 }).ids);
    expect((await drafted.usage).compute.speculative!.drafted).toBeGreaterThan(0);
  });
}
