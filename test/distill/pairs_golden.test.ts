// Training of encoder-decoder models: the loss of targets and its gradients are those of torch, on every device.
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { openSeq2Seq, pairProgram, pairRun, trainedPlan } from '../../lib/distill/seq2seq/model.js';
import { pairBatch } from '../../lib/distill/seq2seq/pairs.js';
import { Trainable } from '../../lib/distill/trainable.js';
import { seq2seqSlots } from '../../lib/model/seq2seq_weights.js';
import { exportSlots, planOf } from '../../lib/model/weights.js';
import { Engine } from '../../lib/native/index.js';
import { largestDifference, readSeq2SeqCases, readVectors, seq2seqDirectory } from '../model/golden.js';
import { temporaryDirectory } from '../temporary.js';
import { zeroBiased } from './pairs.js';

const root = temporaryDirectory();

describe.each(['bart', 'mbart', 'marian', 't5', 't5-gated'])('%s', (name) => {
  it('has the loss and the gradients of torch', async () => {
    const golden = readVectors(join(seq2seqDirectory(name), 'training.safetensors'));
    const labels = [[10, 4, 2], [3, 17, 5, 22, 9, 12, 8, 2], [2]];
    const { sources } = readSeq2SeqCases(name);
    const model = await openSeq2Seq(
      'finetune',
      { from: await zeroBiased(seq2seqDirectory(name), join(root, name)) },
      0,
    );
    using engine = new Engine();
    const plan = trainedPlan(model);
    using trainable = new Trainable(plan);
    const slots = seq2seqSlots(model.spec, model.ownHead);
    const whole = new Map(planOf(slots).parameters.map((parameter) => [parameter.name, parameter]));
    const values = new Float32Array(plan.size);
    for (const { name, offset, size } of plan.parameters) {
      const at = whole.get(name)!.offset;
      values.set(model.weights.subarray(at, at + size), offset);
    }
    trainable.params.write(values);
    using program = pairProgram(model, trainable, engine, { batchTokens: 64, train: true });
    const batch = pairBatch(
      sources.map((source, i) => ({ source, target: labels[i] })),
      2,
    );
    const { outputs } = await program.run(pairRun(batch, 1 / 12));
    expect(outputs.loss[0]).toBeCloseTo(golden.loss[0], 4);
    // In the layout of files, to be compared name by name.
    const gradients = new Float32Array(planOf(slots).size);
    const flat = trainable.grads.readFloat();
    for (const { name, offset, size } of plan.parameters)
      gradients.set(flat.subarray(offset, offset + size), whole.get(name)!.offset);
    const stored = exportSlots(model.spec.decoder, slots, gradients);
    const compared = Object.entries(stored).filter(([tensor]) => !tensor.includes('relative_attention_bias'));
    expect(compared).toHaveLength(Object.keys(golden).length - 1);
    for (const [tensor, { data }] of compared) {
      const expected = golden[tensor] as Float32Array;
      // A bias of keys moves all scores of a query alike: its gradient is rounding.
      const tolerance = 1e-3 * expected.reduce((most, x) => Math.max(most, Math.abs(x)), 0) + 1e-7;
      expect(largestDifference(data as Float32Array, expected), tensor).toBeLessThan(tolerance);
    }
  });
});
