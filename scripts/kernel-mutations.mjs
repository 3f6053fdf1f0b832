// Defects seeded into kernels by scripts/mutate-kernels.mjs: the classic mistakes of CUDA code, one at a time. `search`
// occurs exactly once in `file`. `missed` says why the emulation cannot see a defect; all others must be caught.
const examples = 'native/test/device_examples.cu';
const device = 'native/device/device.h';

export const mutations = [
  // Softmax: block-wide reductions
  {
    what: 'softmax: no barrier before the partial results are overwritten',
    file: examples,
    search: 'syncThreads();  // the previous reduction has been read',
    replace: '',
  },
  {
    what: 'softmax: no barrier before the partial results are read',
    file: examples,
    search: 'syncThreads();  // partial is complete',
    replace: '',
  },
  {
    what: 'softmax: a barrier that only one lane reaches',
    file: examples,
    search: 'if (lane == 0) s.partial[warp] = value;\n  syncThreads();',
    replace: 'if (lane == 0) {\n    s.partial[warp] = value;\n    syncThreads();\n  }',
  },
  {
    what: 'softmax: reads one column too many',
    file: examples,
    search: 'i < columns; i += kSoftmaxThreads) top =',
    replace: 'i <= columns; i += kSoftmaxThreads) top =',
  },
  {
    what: 'softmax: writes one column too many',
    file: examples,
    search: 'i < columns; i += kSoftmaxThreads) {\n    stGlobal',
    replace: 'i <= columns; i += kSoftmaxThreads) {\n    stGlobal',
  },
  {
    what: 'warpMax over half a warp',
    file: device,
    search: '= 16; offset > 0; offset >>= 1) value = fmaxf',
    replace: '= 8; offset > 0; offset >>= 1) value = fmaxf',
  },
  {
    what: 'warpSum by a mask of half a warp',
    file: device,
    search: 'value += shflXor(value, offset);',
    replace: 'value += shflXor(value, offset, 0xffffu);',
  },

  // GEMM by cp.async, ldmatrix and mma.sync
  {
    what: 'mma: no barrier after waiting for cp.async',
    file: examples,
    search: "syncThreads();  // this step's tiles are complete",
    replace: '',
  },
  {
    what: 'mma: no barrier before a tile is overwritten',
    file: examples,
    search: "syncThreads();  // this step's tiles may be overwritten",
    replace: '',
  },
  {
    what: 'mma: one group too many left in flight',
    file: examples,
    search: 'cpAsyncWait<1>();',
    replace: 'cpAsyncWait<2>();',
  },
  { what: 'mma: the last tile is not waited for', file: examples, search: 'cpAsyncWait<0>();', replace: '' },
  { what: 'mma: groups are not committed', file: examples, search: '    cpAsyncCommit();\n', replace: '' },
  {
    what: 'mma: no swizzle (bank conflicts)',
    file: examples,
    search: '(chunk ^ (row >> 1 & (kChunks - 1))) * 8',
    replace: 'chunk * 8',
  },
  {
    what: 'mma: a swizzle too weak (bank conflicts)',
    file: examples,
    search: '(row >> 1 & (kChunks - 1))',
    replace: '(row >> 1 & 1)',
  },
  {
    what: 'mma: rows past the end are read',
    file: examples,
    search: 'const bool inX = m < g.m && column < g.k;',
    replace: 'const bool inX = column < g.k;',
  },
  {
    what: 'mma: rows of the weight past the end are read',
    file: examples,
    search: 'const bool inW = n < g.n && column < g.k;',
    replace: 'const bool inW = column < g.k;',
  },
  {
    what: 'mma: columns past the end are read',
    file: examples,
    search: 'const bool inX = m < g.m && column < g.k;',
    replace: 'const bool inX = m < g.m;',
  },
  {
    what: 'mma: a predicated copy without its predicate',
    file: examples,
    search: 'size_t(ldGlobal(g.rows + m)) * g.k + column : g.x, inX);',
    replace: 'size_t(ldGlobal(g.rows + m)) * g.k + column : g.x);',
  },
  { what: 'mma: lanes of ldmatrix permuted', file: examples, search: 'lane / 8 % 2)]', replace: 'lane / 16)]' },
  {
    what: 'mma: a source address not aligned',
    file: examples,
    search: 'size_t(ldGlobal(g.rows + m)) * g.k + column : g.x, inX);',
    replace: 'size_t(ldGlobal(g.rows + m)) * g.k + column + 1 : g.x, inX);',
  },
  {
    what: 'mma: one buffer where there should be two',
    file: examples,
    search: 'bf16 *a = s.a[step % 2], *b = s.b[step % 2];\n    for',
    replace: 'bf16 *a = s.a[step % 2], *b = s.b[0];\n    for',
  },
  {
    what: 'mma: columns past the end are written',
    file: examples,
    search: 'if (n < g.n) stGlobal(y + n, fmaf(gate, sum[i]',
    replace: 'stGlobal(y + n, fmaf(gate, sum[i]',
  },
  {
    what: 'mma: results are not scattered',
    file: examples,
    search:
      'const int m = firstM + warpM + i * 16 + lane / 4 + half * 8;\n      if (m >= g.m) continue;\n      float* y = g.y + size_t(ldGlobal(g.rows + m))',
    replace:
      'const int m = firstM + warpM + i * 16 + lane / 4 + half * 8;\n      if (m >= g.m) continue;\n      float* y = g.y + size_t(m)',
  },

  // Warp-specialised GEMM by TMA, mbarriers and wgmma
  {
    what: 'wgmma: a stage is released while it is multiplied',
    file: examples,
    search: 'if (step > 0 && lane == 0) mbarrierArrive(s.empty[(step - 1) % kStages]);',
    replace: 'if (lane == 0) mbarrierArrive(s.empty[stage]);',
  },
  {
    what: 'wgmma: the last products are not waited for',
    file: examples,
    search: '  wgmmaWait<0>(sum);\n',
    replace: '',
  },
  {
    what: 'wgmma: one group too many left in flight',
    file: examples,
    search: 'wgmmaWait<1>(sum);',
    replace: 'wgmmaWait<2>(sum);',
  },
  { what: 'wgmma: no fence', file: examples, search: '    wgmmaFence();\n', replace: '' },
  { what: 'wgmma: products are not committed', file: examples, search: '    wgmmaCommit();\n', replace: '' },
  { what: 'wgmma: the sum is not cleared', file: examples, search: 'step > 0 || k > 0);', replace: 'true);' },
  {
    what: 'wgmma: the producer waits for the wrong phase',
    file: examples,
    search: '(step / kStages & 1) ^ 1)',
    replace: 'step / kStages & 1)',
  },
  {
    what: 'wgmma: the producer does not wait',
    file: examples,
    search: 'mbarrierWait(s.empty[stage], (step / kStages & 1) ^ 1);',
    replace: '',
  },
  {
    what: 'wgmma: the consumer does not wait',
    file: examples,
    search: 'mbarrierWait(s.full[stage], step / kStages & 1);',
    replace: '',
  },
  {
    what: 'wgmma: barriers are used before they are initialised',
    file: examples,
    search: '    fenceMbarrierInit();\n  }\n  syncThreads();',
    replace: '    fenceMbarrierInit();\n  }',
  },
  {
    what: 'wgmma: full misses an arrival',
    file: examples,
    search: 'mbarrierInit(s.full[i], 128 + 1);',
    replace: 'mbarrierInit(s.full[i], 128);',
  },
  {
    what: 'wgmma: empty after a warpgroup',
    file: examples,
    search: 'mbarrierInit(s.empty[i], 8);',
    replace: 'mbarrierInit(s.empty[i], 4);',
  },
  {
    what: 'wgmma: half of the bytes announced',
    file: examples,
    search: 'mbarrierArriveExpectTx(s.full[stage], kTileBytes);',
    replace: 'mbarrierArriveExpectTx(s.full[stage], kTileBytes / 2);',
  },
  {
    what: 'wgmma: cp.async does not arrive',
    file: examples,
    search: '    cpAsyncArrive(s.full[stage]);\n',
    replace: '',
  },
  {
    what: 'wgmma: gathered rows are not swizzled',
    file: examples,
    search: 'tile + swizzle128(tid / 8 + i * kRowsAtOnce, chunk)',
    replace: 'tile + (tid / 8 + i * kRowsAtOnce) * 128 + chunk * 16',
  },
  {
    what: 'wgmma: descriptors advance too far',
    file: examples,
    search: 'descriptorAdvance(a, k * 32)',
    replace: 'descriptorAdvance(a, k * 64)',
  },
  {
    what: 'wgmma: the second warpgroup takes the wrong rows',
    file: examples,
    search: 's.a[stage] + group * 64 * kHopperK',
    replace: 's.a[stage] + group * 32 * kHopperK',
  },
  {
    what: 'wgmma: coordinates of TMA swapped',
    file: examples,
    search: 'step * kHopperK, firstN);\n    }',
    replace: 'firstN, step * kHopperK);\n    }',
  },
  {
    what: 'wgmma: columns past the end are gathered',
    file: examples,
    search: 'const bool inK = step * kHopperK + chunk * 8 < g.k;',
    replace: 'const bool inK = true;',
  },
  {
    what: 'wgmma: no proxy fence between cp.async and wgmma',
    file: examples,
    search: 'fenceProxyAsync();  // rows that cp.async wrote, for wgmma',
    replace: '',
    missed: 'the emulation has one view of memory',
  },
];
