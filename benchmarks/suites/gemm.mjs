// Matrix products: ours against torch and the machine's peak, and what a prefix of a feed-forward layer's width and a
// low-rank patch cost.

import { roundRobin, summary, warmUp } from '../harness/measure.mjs';
import { buildPeak, measurePeak } from '../harness/peak.mjs';
import { number, table, target } from '../harness/report.mjs';

// M x K x N; the first is the one with a target.
const SHAPES = [
  [512, 768, 3072],
  [512, 3072, 768],
  [512, 768, 768],
  [2048, 768, 3072],
  [64, 768, 3072],
  [8, 768, 3072],
  [1, 768, 3072],
];
const SLICES = { rows: 512, hidden: 768, ffn: 3072, widths: [3072, 1536, 768, 384] };
const PATCHES = {
  shapes: [
    [512, 768, 3072],
    [512, 768, 768],
    [8, 768, 3072],
    [1, 768, 3072],
  ],
  rank: 16,
  ways: ['none', 'patch', 'second product'],
};
const COPIES = 8; // weights used in turn: 75 MB of the largest shape, more than the caches hold

export async function gemm({ start, peers, threads, rounds, repeats, quick, cache, log }) {
  log('gemm: building the peak program');
  const peakProgram = buildPeak(cache);
  const shapes = quick ? SHAPES.slice(0, 2) : SHAPES;
  const batchMs = quick ? 100 : 300;
  const children = [];
  try {
    const ours = start('elastiform', 'ours.mjs');
    children.push(ours);
    const libraries = {
      elastiform: await ours.ask('products', { threads, shapes, copies: COPIES, slices: SLICES, patches: PATCHES }),
    };
    let torch = null;
    if (peers.torch.file) {
      torch = start('torch', peers.torch.file, peers.torch.options);
      children.push(torch);
      libraries.torch = await torch.ask('products', { threads, shapes, copies: COPIES });
    }
    const peaks = [measurePeak(peakProgram).gflops];
    const rows = [];
    for (const [index, [m, k, n]] of shapes.entries()) {
      const name = `${m}x${k}x${n}`;
      log(`gemm: ${name}`);
      const contestants = [{ key: 'elastiform', child: ours, command: 'product', args: { index } }];
      if (torch) {
        for (const layout of ['in-out', 'out-in']) {
          contestants.push({
            key: `torch ${layout}`,
            child: torch,
            command: 'product',
            args: { shape: index, layout },
          });
        }
      }
      await warmUp(contestants);
      const times = await roundRobin(contestants, { rounds, repeats, batchMs });
      const torchBest = torch ? Math.min(times['torch in-out'].median, times['torch out-in'].median) : null;
      const gflops = (ms) => (2e-6 * m * k * n) / ms;
      rows.push({
        shape: name,
        milliseconds: times,
        gflops: { elastiform: gflops(times.elastiform.median), torch: torchBest && gflops(torchBest) },
        ratioToTorch: torchBest && torchBest / times.elastiform.median,
      });
      if (index === 0) peaks.push(measurePeak(peakProgram).gflops);
    }
    log('gemm: prefix slices');
    const contestants = SLICES.widths.flatMap((width, i) =>
      ['up', 'down'].map((part, j) => ({
        key: `${part} ${width}`,
        child: ours,
        command: 'product',
        args: { index: shapes.length + 2 * i + j },
      })),
    );
    await warmUp(contestants);
    const times = await roundRobin(contestants, { rounds, repeats, batchMs });
    log('gemm: patches');
    const firstPatch = shapes.length + 2 * SLICES.widths.length;
    const patches = [];
    for (const [i, shape] of PATCHES.shapes.entries()) {
      const ways = PATCHES.ways.map((key, j) => ({
        key,
        child: ours,
        command: 'product',
        args: { index: firstPatch + i * PATCHES.ways.length + j },
      }));
      await warmUp(ways);
      const milliseconds = await roundRobin(ways, { rounds, repeats, batchMs });
      const over = (way) => milliseconds[way].median / milliseconds.none.median;
      patches.push({
        shape: shape.join('x'),
        rank: PATCHES.rank,
        milliseconds,
        patch: over('patch'),
        secondProduct: over('second product'),
      });
    }
    peaks.push(measurePeak(peakProgram).gflops);
    // The peak is the machine's: the most that was seen, not the least.
    const peak = { gflops: Math.max(...peaks), seen: summary(peaks) };
    const whole = (part) => times[`${part} ${SLICES.ffn}`].median;
    const slices = SLICES.widths.map((width) => {
      const share = width / SLICES.ffn;
      const cost = (part) => times[`${part} ${width}`].median / whole(part) / share;
      const both =
        (times[`up ${width}`].median + times[`down ${width}`].median) / (whole('up') + whole('down')) / share;
      return { width, share, up: cost('up'), down: cost('down'), both };
    });
    const first = rows[0];
    const text = [
      `FMA peak ${number(peak.gflops)} GFLOP/s with ${threads} threads.`,
      table(
        ['M x K x N', 'ours GFLOP/s', '% of peak', 'torch mm GFLOP/s', 'ours / torch'],
        rows.map((r) => [
          r.shape,
          number(r.gflops.elastiform),
          number((100 * r.gflops.elastiform) / peak.gflops, 0),
          number(r.gflops.torch),
          number(r.ratioToTorch, 2),
        ]),
      ),
      `Prefix of a feed-forward layer (${SLICES.rows} rows, ${SLICES.hidden} x ${SLICES.ffn}): time over its share of the whole (1 is linear).`,
      table(
        ['width', 'share', 'up (linear, GELU)', 'down (linear_add)', 'both'],
        slices.map((s) => [s.width, s.share, number(s.up, 2), number(s.down, 2), number(s.both, 2)]),
      ),
      `A patch of rank ${PATCHES.rank} (LoRA): time over that of the product without one.`,
      table(
        ['M x K x N', 'in the same product', 'by a second product'],
        patches.map((p) => [p.shape, number(p.patch, 3), number(p.secondProduct, 3)]),
      ),
    ].join('\n\n');
    return {
      libraries,
      data: { peak, shapes: rows, slices: { milliseconds: times, costs: slices }, patches },
      text,
      targets: [
        target('f32 product 512x768x3072 over FMA peak', 0.85, first.gflops.elastiform / peak.gflops),
        target('f32 product 512x768x3072 over torch mm', 1, first.ratioToTorch),
        target('cost of FFN width prefixes over their share, worst', 1.1, Math.max(...slices.map((s) => s.both)), {
          most: true,
        }),
      ],
    };
  } finally {
    for (const child of children) await child.stop();
  }
}
