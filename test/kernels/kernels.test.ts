// Kernels against float64, and what their results must not depend on.
import { afterAll, describe, expect, test } from 'vitest';
import { Kernels } from '../../lib/kernels/index.js';
import { compare } from '../ops/harness.js';
import { act, argmax, flat, floats, matrix, product, softmax, topk } from './reference.js';

const kernels = new Kernels();
afterAll(() => kernels.dispose());
const near = 2e-5;

describe('routing', () => {
  const z = floats(1, 23);
  const offsets = [0, 7, 7, 20, 23];

  test('takes the best rows of every segment', async () => {
    for (const capacity of [
      [0.5, 0.5, 0.5, 0.5],
      [0, 1, 0.34, 1],
    ]) {
      const wanted = topk(z, offsets, capacity);
      const given = { offsets: Int32Array.from(offsets) };
      const routed = await kernels.routeTopk(z, Float32Array.from(capacity), given);
      expect([...routed.rows]).toEqual(wanted.rows);
      expect([...routed.offsets]).toEqual(wanted.starts);
      if (capacity.every((share) => share === 0.5)) {
        expect((await kernels.routeTopk(z, 0.5, given)).rows).toEqual(routed.rows);
      }
    }
  });

  test('is of one segment by default, and ties go to the first rows', async () => {
    expect([...(await kernels.routeTopk(Float32Array.of(1, 2, 1, 1), 0.5)).rows]).toEqual([0, 1]);
    const many = Int32Array.from({ length: 10 }, (_, i) => Math.min(i, 4));
    const each = await kernels.routeTopk(Float32Array.of(1, 2, 1, 1), 0.5, { offsets: many });
    expect([...each.offsets]).toEqual([...many]);
  });

  test('takes rows above a threshold', async () => {
    const { rows, offsets: starts } = await kernels.routeThreshold(z, Float32Array.of(0, 9, -Infinity, 0.5), {
      offsets: Int32Array.from(offsets),
    });
    const wanted = [...z.keys()].filter((r) => (r < 7 && z[r] > 0) || (r >= 7 && r < 20) || (r >= 20 && z[r] > 0.5));
    expect([...rows]).toEqual(wanted);
    expect(starts[2]).toBe(starts[1]);
    expect(starts[4]).toBe(wanted.length);
    expect([...(await kernels.routeThreshold(z, 9)).rows]).toEqual([]);
  });
});

describe('linear', () => {
  const [M, K, N, R] = [9, 13, 11, 3];
  const [x, w, bias, a, b] = [floats(2, M * K), floats(3, N * K), floats(4, N), floats(5, R * K), floats(6, N * R)];
  const weights = {
    w: kernels.weight(w, [N, K]),
    bias: kernels.weight(bias, [N]),
    lora: { a: kernels.weight(a, [R, K]), b: kernels.weight(b, [N, R]) },
  };

  test('is a product, whole and in part, with bias and activation', async () => {
    for (const name of ['none', 'relu', 'silu', 'gelu_tanh'] as const) {
      const { y, flops } = await kernels.linear(x, weights.w, { bias: weights.bias, act: name });
      const wanted = product(matrix(x, K), matrix(w, K), bias).map((row) => row.map(act[name]));
      compare(y, flat(wanted), near, name);
      expect(flops).toBeGreaterThanOrEqual(2 * M * N * K);
    }
    const rows = Int32Array.of(1, 4, 8);
    const { y } = await kernels.linear(x, weights.w, { rows, width: 5 });
    const some = [...rows].map((r) => matrix(x, K)[r]);
    compare(y, flat(product(some, matrix(w, K).slice(0, 5))), near, 'rows and width');
  });

  test('adds a correction before bias and activation', async () => {
    const rows = Int32Array.of(0, 2, 3, 7);
    const some = [...rows].map((r) => matrix(x, K)[r]);
    const low = product(product(some, matrix(a, K)), matrix(b, R));
    const wanted = product(some, matrix(w, K), bias).map((row, r) => row.map((v, n) => act.silu(v + low[r][n])));
    const { bias: added, lora } = weights;
    const { y } = await kernels.linear(x, weights.w, { bias: added, lora, act: 'silu', rows });
    compare(y, flat(wanted), near, 'correction');
  });

  test('takes weights of 16 bits', async () => {
    // 1.5 and -0.25 in bf16 and in f16.
    const narrow = [kernels.weight(Uint16Array.of(0x3fc0, 0xbe80), [1, 2], 'bf16')];
    narrow.push(kernels.weight(Uint16Array.of(0x3e00, 0xb400), [1, 2], 'f16'));
    for (const of of narrow) expect([...(await kernels.linear(Float32Array.of(2, 4), of)).y]).toEqual([2]);
  });
});

describe('feedForward', () => {
  const [N, D, F] = [10, 12, 34];
  const data = { x: floats(7, N * D), residual: floats(8, N * D), gate: floats(9, F * D), up: floats(10, F * D) };
  const more = { down: floats(11, D * F), gateBias: floats(12, F), upBias: floats(13, F), downBias: floats(14, D) };
  const weights = {
    gate: kernels.weight(data.gate, [F, D]),
    up: kernels.weight(data.up, [F, D]),
    down: kernels.weight(more.down, [D, F]),
    gateBias: kernels.weight(more.gateBias, [F]),
    upBias: kernels.weight(more.upBias, [F]),
    downBias: kernels.weight(more.downBias, [D]),
  };
  const { up, upBias, down, downBias } = weights;
  const rows = Int32Array.of(0, 3, 4, 9);

  function reference(gated: boolean, width: number, chosen: Int32Array, gates: ArrayLike<number> | null) {
    const x = matrix(data.x, D);
    const some = [...chosen].map((r) => x[r]);
    const u = product(some, matrix(data.up, D).slice(0, width), more.upBias);
    const g = product(some, matrix(data.gate, D).slice(0, width), more.gateBias);
    const h = u.map((row, r) => row.map((v, i) => (gated ? act.silu(g[r][i]) * v : act.gelu_tanh(v))));
    const out = product(
      h,
      matrix(more.down, F).map((row) => row.slice(0, width)),
      more.downBias,
    );
    const y = matrix(data.residual, D);
    for (const [i, r] of chosen.entries()) y[r] = y[r].map((v, d) => v + (gates?.[i] ?? 1) * out[i][d]);
    return flat(y);
  }
  const all = Int32Array.from({ length: N }, (_, i) => i);
  const { x, residual } = data;

  test('is gated or not, of any width', async () => {
    for (const width of [1, 17, F]) {
      const gated = await kernels.feedForward(x, weights, { act: 'silu', width, residual });
      compare(gated.y, reference(true, width, all, null), near, `gated ${width}`);
      const plain = await kernels.feedForward(x, { up, upBias, down, downBias }, { act: 'gelu_tanh', width, residual });
      compare(plain.y, reference(false, width, all, null), near, `plain ${width}`);
    }
  });

  test('adds chosen rows with their gates; others keep their bits', async () => {
    const gates = Float32Array.of(0.5, -1, 2, 0);
    const { y } = await kernels.feedForward(x, weights, { act: 'silu', rows, gates, residual });
    compare(y, reference(true, F, rows, gates), near, 'gates');
    for (const r of all) {
      if (!rows.includes(r)) expect(y.slice(r * D, r * D + D)).toEqual(residual.slice(r * D, r * D + D));
    }
  });

  test('gives a row the bits it has among all, and a prefix those of the smaller layer', async () => {
    const width = 17;
    const whole = await kernels.feedForward(x, weights, { act: 'silu', width, residual });
    const part = await kernels.feedForward(x, weights, { act: 'silu', width, rows, residual });
    for (const r of rows) expect(part.y.slice(r * D, r * D + D)).toEqual(whole.y.slice(r * D, r * D + D));
    const small = {
      gate: kernels.weight(data.gate.slice(0, width * D), [width, D]),
      up: kernels.weight(data.up.slice(0, width * D), [width, D]),
      down: kernels.weight(Float32Array.from(matrix(more.down, F).flatMap((row) => row.slice(0, width))), [D, width]),
      gateBias: kernels.weight(more.gateBias.slice(0, width), [width]),
      upBias: kernels.weight(more.upBias.slice(0, width), [width]),
      downBias,
    };
    expect((await kernels.feedForward(x, small, { act: 'silu', residual })).y).toEqual(whole.y);
  });

  test('costs what its rows and its width cost', async () => {
    const flops = async (options: object) => (await kernels.feedForward(x, weights, { act: 'silu', ...options })).flops;
    const full = await flops({});
    expect(full).toBeGreaterThanOrEqual(N * 3 * 2 * D * F);
    expect((await flops({ rows })) / full).toBeCloseTo(rows.length / N, 2);
    expect((await flops({ width: 17 })) / full).toBeCloseTo(0.5, 1);
    expect(await flops({ rows: new Int32Array(0) })).toBe(0);
  });

  test('without rows to run is the residual, and without a residual only the layer', async () => {
    const none = await kernels.feedForward(x, weights, { act: 'silu', rows: new Int32Array(0), residual });
    expect(none.y).toEqual(residual);
    expect(none.y).not.toBe(residual);
    const alone = await kernels.feedForward(x, weights, { act: 'silu', rows });
    const together = await kernels.feedForward(x, weights, { act: 'silu', rows, residual });
    compare(alone.y, flat([[...together.y].map((v, i) => v - residual[i])]), near, 'the layer alone');
  });
});

describe('divergence', () => {
  const [R, K, J, V] = [6, 8, 5, 29];
  const [student, teacher, other] = [floats(15, R * K), floats(16, R * K), floats(17, R * J)];
  const [head, headJ] = [floats(18, V * K), floats(19, V * J)];
  const [w, teacherHead] = [kernels.weight(head, [V, K]), kernels.weight(headJ, [V, J])];
  const sum = (values: readonly number[]) => values.reduce((a, b) => a + b, 0);
  const kl = (p: readonly number[], q: readonly number[]) => sum(p.map((v, i) => v * Math.log(v / q[i])));
  const of = {
    kl,
    'reverse-kl': (p: readonly number[], q: readonly number[]) => kl(q, p),
    jsd(p: readonly number[], q: readonly number[], beta: number) {
      const m = p.map((v, i) => beta * v + (1 - beta) * q[i]);
      return beta * kl(p, m) + (1 - beta) * kl(q, m);
    },
  };

  test('is each kind, and its gradient that of finite differences', async () => {
    const weights = floats(20, R).map(Math.abs);
    for (const [kind, beta] of [
      ['kl', 0.5] as const,
      ['reverse-kl', 0.5] as const,
      ['jsd', 0.3] as const,
      ['jsd', 0.6] as const,
    ]) {
      for (const own of [false, true]) {
        const p = product(matrix(own ? other : teacher, own ? J : K), matrix(own ? headJ : head, own ? J : K));
        const rowsOf = (h: ArrayLike<number>) =>
          product(matrix(h, K), matrix(head, K)).map((q, r) => of[kind](softmax(p[r]), softmax(q), beta));
        const loss = (h: ArrayLike<number>) => sum(rowsOf(h).map((v, r) => v * weights[r]));
        const options = { kind, beta, weights, ...(own && { teacherHead }) };
        const result = await kernels.divergence(student, own ? other : teacher, w, options);
        compare(result.row, rowsOf(student), near, `${kind} rows`);
        compare([result.loss], [loss(student)], near, `${kind} loss`);
        const differences = [...student.keys()].map((i) => {
          const at = (d: number) => loss(Float64Array.from(student, (v, j) => (j === i ? v + d : v)));
          return (at(1e-5) - at(-1e-5)) / 2e-5;
        });
        compare(result.gradient!, differences, near, `${kind} gradient`);
        const agree = product(matrix(student, K), matrix(head, K)).map((q, r) => Number(argmax(q) === argmax(p[r])));
        expect([...result.agree]).toEqual(agree);
      }
    }
  });

  test('is the mean by default, and exactly 0 where both are equal', async () => {
    const mean = await kernels.divergence(student, teacher, w);
    compare([mean.loss], [sum([...mean.row]) / R], near, 'mean');
    expect((await kernels.divergence(student, teacher, w, { gradient: false })).gradient).toBeNull();
    const same = await kernels.divergence(student, student, w);
    expect(same.loss).toBe(0);
    expect(same.gradient!.every((g) => g === 0)).toBe(true);
    expect([...same.agree]).toEqual(Array(R).fill(1));
  });
});

describe('exit', () => {
  const [R, K, V] = [12, 6, 17];
  const [h, head] = [floats(21, R * K).map((v) => v * 4), floats(22, V * K)];
  const w = kernels.weight(head, [V, K]);
  const probabilities = product(matrix(h, K), matrix(head, K)).map((z) => softmax(z));
  const sorted = probabilities.map((p) => [...p].sort((a, b) => b - a));
  const wanted = {
    entropy: probabilities.map((p) => -p.reduce((sum, v) => sum + v * Math.log(v), 0)),
    margin: sorted.map(([first, second]) => first - second),
    maxprob: sorted.map(([first]) => first),
  };

  test('judges every row by its distribution', async () => {
    for (const rule of ['entropy', 'margin', 'maxprob'] as const) {
      const threshold = [...wanted[rule]].sort((a, b) => a - b)[5] + 1e-3;
      const { confidence, leave, stay } = await kernels.exit(h, w, { rule, threshold });
      compare(confidence, wanted[rule], near, rule);
      const sure = (v: number) => (rule === 'entropy' ? v < threshold : v > threshold);
      expect([...leave]).toEqual([...wanted[rule].keys()].filter((r) => sure(wanted[rule][r])));
      expect([...stay]).toEqual([...wanted[rule].keys()].filter((r) => !sure(wanted[rule][r])));
      expect(leave.length).toBeGreaterThan(0);
      expect(stay.length).toBeGreaterThan(0);
    }
  });

  test('lets nobody leave at thresholds that mean the full model, and nobody whose logits are not numbers', async () => {
    const certain = Float32Array.of(1000, 0, 0, 0, 0, 0);
    for (const [rule, threshold] of [['entropy', 0] as const, ['margin', 1] as const, ['maxprob', 1] as const]) {
      const { leave, stay } = await kernels.exit(certain, w, { rule, threshold });
      expect([leave.length, stay.length]).toEqual([0, 1]);
      // Nobody leaves at a threshold that is just the row's confidence.
      const { confidence } = await kernels.exit(h, w, { rule, threshold });
      const equal = await kernels.exit(h, w, { rule, threshold: confidence[3] });
      expect(equal.stay).toContain(3);
      const unsure = rule === 'entropy' ? 1e9 : -1;
      const nan = h.slice(0, 2 * K).fill(Number.NaN, 0, K);
      expect([...(await kernels.exit(nan, w, { rule, threshold: unsure })).stay]).toEqual([0]);
    }
  });
});

test('the entropy of a certain row is not below 0, whatever the number of classes', async () => {
  for (let classes = 2; classes < 20; classes++) {
    const head = kernels.weight(floats(25, classes), [classes, 1]);
    const { leave } = await kernels.exit(Float32Array.of(1e6, -1e6), head, { rule: 'entropy', threshold: 0 });
    expect(leave, `${classes} classes`).toHaveLength(0);
  }
});

test('results do not depend on how many rows came before, nor on calls under way', async () => {
  const [K, N] = [8, 7];
  const w = kernels.weight(floats(23, N * K), [N, K]);
  const x = floats(24, 40 * K);
  const runs = [1, 40, 3, 5].map((rows) => kernels.linear(x.slice(0, rows * K), w));
  const ys = (await Promise.all(runs)).map(({ y }) => y);
  for (const y of ys) expect(y).toEqual(ys[1].slice(0, y.length));
});
