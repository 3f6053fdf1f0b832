// The compute formula against sums done by hand. That kernels count the same is tested with the decoder.
import { expect, it } from 'vitest';
import { causalPairs, forwardFlops } from '../../lib/model/flops.js';
import { specFromConfig } from '../../lib/model/spec.js';

const gpt2Small = specFromConfig(
  { model_type: 'gpt2', n_embd: 768, n_head: 12, n_layer: 12, vocab_size: 50257, n_positions: 1024 },
  'gpt2',
);

it('counts the pairs that causal attention sees', () => {
  expect(causalPairs([4])).toBe(10);
  expect(causalPairs([4, 2])).toBe(13);
  expect(causalPairs([1, 1], [7, 0])).toBe(9);
  expect(causalPairs([2], [3])).toBe(4 + 5);
});

it('counts a prefill', () => {
  const { perLayer, head, total } = forwardFlops(gpt2Small, [512]);
  expect(perLayer.attn).toBe(2 * 512 * 4 * 768 * 768 + 4 * 768 * ((512 * 513) / 2));
  expect(perLayer.mlp).toBe(2 * 512 * 2 * 768 * 3072);
  expect(head).toBe(2 * 512 * 768 * 50257);
  expect(total).toBe(12 * (perLayer.attn + perLayer.mlp) + head);
  expect(forwardFlops(gpt2Small, [512], { headRows: 1 }).head).toBe(2 * 768 * 50257);
});

it('counts rows alike however a sequence is cut', () => {
  const whole = forwardFlops(gpt2Small, [10]).total;
  const parts = Array.from({ length: 10 }, (_, cached) => forwardFlops(gpt2Small, [1], { cached: [cached] }).total);
  expect(parts.reduce((sum, flops) => sum + flops, 0)).toBe(whole);
});
