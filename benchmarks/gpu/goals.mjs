// What the project wants on a GPU, and what measurements say about it.
import { number, table } from '../harness/report.mjs';
import { flops } from './shapes.mjs';

const median = (group, key) => group?.entries[key]?.median ?? null;
const least = (values) => (values.length > 0 && values.every((value) => value !== null) ? Math.min(...values) : null);
/** `theirs / ours`: how many times as fast we are. */
const over = (theirs, ours) => (theirs === null || ours === null ? null : theirs / ours);

/** The fastest of several contestants that were measured. */
function fastest(group, ...keys) {
  const times = keys.map((key) => median(group, key)).filter((time) => time !== null);
  return times.length > 0 ? Math.min(...times) : null;
}

const speed = (group, theirs, ours) => over(median(group, theirs), median(group, ours));
const fact = (group, key, name) => group?.entries[key]?.facts?.[name] ?? null;

/** `most`: the wanted value is an upper limit. `value` gets the groups that were measured; null is what was not. */
export const GOALS = [
  {
    id: 'gemm',
    what: 'dense products of Llama-8B layers, TFLOP/s over cuBLAS (its faster library), worst shape',
    wanted: 0.95,
    value: ({ gemm }) =>
      gemm
        ? least(
            Object.keys(gemm.shape.products).map((name) =>
              over(fastest(gemm, `cublaslt ${name}`, `cublas ${name}`), median(gemm, `ours ${name}`)),
            ),
          )
        : null,
  },
  {
    id: 'routed over dense',
    what: 'routed FFN at 0.5, d 4096, over our dense FFN',
    wanted: 1.85,
    value: (groups) => speed(groups['ffn large'], 'ours dense', 'ours routed'),
  },
  {
    id: 'routed over cublaslt',
    what: 'the same over a dense cuBLASLt pipeline',
    wanted: 1.95,
    value: (groups) => speed(groups['ffn large'], 'cublaslt dense', 'ours routed'),
  },
  {
    id: 'routed over eager',
    what: 'the same over PyTorch index_select, FFN, index_add',
    wanted: 1.15,
    value: (groups) => speed(groups['ffn large'], 'eager routed', 'ours routed'),
  },
  {
    id: 'routed over triton',
    what: 'the same over a Triton layer that gathers and scatters',
    wanted: 1.5,
    value: (groups) => speed(groups['ffn large'], 'triton routed', 'ours routed'),
  },
  {
    id: 'small over cublaslt',
    what: 'routed FFN at 0.5, d 768, over a dense cuBLASLt pipeline',
    wanted: 1.5,
    value: (groups) => speed(groups['ffn small'], 'cublaslt dense', 'ours routed'),
  },
  {
    id: 'small over eager',
    what: 'the same over PyTorch eager, dense or routed, the faster',
    wanted: 2,
    value: (groups) => {
      const group = groups['ffn small'];
      return over(fastest(group, 'eager dense', 'eager routed'), median(group, 'ours routed'));
    },
  },
  {
    id: 'branches',
    what: 'half of 8 FFN blocks, d 768, 512 rows: products side by side over one after the other',
    wanted: 1,
    value: ({ blocks }) => speed(blocks, 'ours blocks in a chain', 'ours blocks'),
  },
  {
    id: 'slices',
    what: 'FFN width prefixes: share of the ideal speed-up, worst width',
    wanted: 0.97,
    value: ({ slices }) =>
      slices
        ? least(
            slices.shape.shares.map((share) => {
              const [whole, part] = [median(slices, 'ours 1'), median(slices, `ours ${share}`)];
              return whole === null || part === null ? null : (share * whole) / part;
            }),
          )
        : null,
  },
  {
    id: 'topk',
    what: 'top-k of 8192 scores',
    wanted: 10,
    unit: ' µs',
    most: true,
    value: ({ topk }) => (median(topk, 'ours topk') === null ? null : 1000 * median(topk, 'ours topk')),
  },
  {
    id: 'attention',
    what: 'causal attention, 32 heads of 128, 8192 rows, over flash attention in PyTorch, worst shape',
    wanted: 1,
    value: ({ attention }) =>
      attention
        ? least(
            attention.shape.segments.map((count) => {
              const name = `${count}x${attention.shape.rows / count}`;
              return speed(attention, `flash ${name}`, `ours ${name}`);
            }),
          )
        : null,
  },
  {
    id: 'loss',
    what: 'distillation loss, vocabulary 128256',
    wanted: 600,
    unit: ' TFLOP/s',
    value: ({ loss }) =>
      median(loss, 'ours loss') === null ? null : flops.loss(loss.shape) / median(loss, 'ours loss') / 1e9,
  },
  {
    id: 'loss memory',
    what: 'memory it needs beside its operands',
    wanted: 0.7,
    unit: ' GB',
    most: true,
    value: ({ loss }) =>
      fact(loss, 'ours loss', 'extraBytes') === null ? null : fact(loss, 'ours loss', 'extraBytes') / 1e9,
  },
  {
    id: 'cpu',
    what: 'CPU time of one step, 12 routed layers, one graph launch',
    wanted: 20,
    unit: ' µs',
    most: true,
    value: (groups) => median(groups['ffn small'], 'ours cpu'),
  },
  {
    id: 'step',
    what: 'distillation step of a Llama of 1.2 billion weights over PyTorch eager',
    wanted: 1.5,
    value: ({ step }) => speed(step, 'eager', 'ours step'),
  },
  {
    id: 'step memory',
    what: 'its memory over PyTorch eager',
    wanted: 1,
    most: true,
    value: ({ step }) => over(fact(step, 'ours step', 'peakBytes'), fact(step, 'eager', 'peakBytes')),
  },
];

/** Every goal with its value: { id, what, wanted, unit, limit, value, met }; null where it was not measured. */
export function judge(groups) {
  return GOALS.map(({ id, what, wanted, unit = '', most = false, value: of }) => {
    const value = of(groups);
    const known = value !== null && Number.isFinite(value);
    const met = known ? (most ? value <= wanted : value >= wanted) : null;
    return { id, what, wanted, unit, limit: most ? 'at most' : 'at least', value: known ? value : null, met };
  });
}

const digits = (value) => (Math.abs(value) >= 100 ? 0 : Math.abs(value) >= 10 ? 1 : 2);

export function goalTable(goals) {
  return table(
    ['goal', 'wanted', 'measured', ''],
    goals.map(({ what, wanted, limit, unit, value, met }) => [
      what,
      `${limit} ${wanted}${unit}`,
      value === null ? 'not measured' : `${number(value, digits(value))}${unit}`,
      met === null ? '-' : met ? 'met' : 'MISSED',
    ]),
  );
}
