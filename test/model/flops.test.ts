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

it('counts the pairs inside a window', () => {
  expect(causalPairs([4], [], 1)).toBe(4);
  expect(causalPairs([4], [], 3)).toBe(1 + 2 + 3 + 3);
  expect(causalPairs([4], [], 100)).toBe(10);
  expect(causalPairs([1, 3], [7, 1], 4)).toBe(4 + (2 + 3 + 4));
  expect(causalPairs([5], [9], 4)).toBe(20);
});

it('counts every layer by its own window', () => {
  const config = {
    model_type: 'gemma3_text',
    hidden_size: 64,
    intermediate_size: 96,
    num_hidden_layers: 3,
    head_dim: 32,
  };
  const heads = { num_attention_heads: 4, num_key_value_heads: 2, vocab_size: 100, sliding_window: 8 };
  const spec = specFromConfig({ ...config, ...heads, sliding_window_pattern: 3 }, 'gemma');
  const products = 2 * 20 * 64 * 32 * (2 * 4 + 2 * 2);
  const { perLayer, total } = forwardFlops(spec, [20], { headRows: 1 });
  const [windowed, full] = [8 * 9 * 0.5 + 12 * 8, 210].map((pairs) => products + 4 * 32 * 4 * pairs);
  expect(perLayer.map(({ attn }) => attn)).toEqual([windowed, windowed, full]);
  expect(perLayer.map(({ mlp }) => mlp)).toEqual(new Array(3).fill(2 * 20 * 64 * 96 * 3));
  expect(total).toBe(2 * windowed + full + 3 * perLayer[0].mlp + 2 * 64 * 100);
});

it('counts a prefill', () => {
  const { perLayer, head, total } = forwardFlops(gpt2Small, [512]);
  expect(perLayer).toHaveLength(12);
  expect(perLayer[11].attn).toBe(2 * 512 * 4 * 768 * 768 + 4 * 768 * ((512 * 513) / 2));
  expect(perLayer[0].mlp).toBe(2 * 512 * 2 * 768 * 3072);
  expect(head).toBe(2 * 512 * 768 * 50257);
  expect(total).toBe(12 * (perLayer[0].attn + perLayer[0].mlp) + head);
  expect(forwardFlops(gpt2Small, [512], { headRows: 1 }).head).toBe(2 * 768 * 50257);
});

it('counts rows alike however a sequence is cut', () => {
  const whole = forwardFlops(gpt2Small, [10]).total;
  const parts = Array.from({ length: 10 }, (_, cached) => forwardFlops(gpt2Small, [1], { cached: [cached] }).total);
  expect(parts.reduce((sum, flops) => sum + flops, 0)).toBe(whole);
});
