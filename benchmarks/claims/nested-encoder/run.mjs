// Adaptive retrieval with a nested encoder: an index of the full model, queries by slices: `npm run claims:nested-encoder`.
import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { distill, elastify, finetune, loadModel } from '../../../dist/index.js';
import { bootstrap } from '../../../dist/infer/quality/statistics.js';
import { machineFacts } from '../../harness/machine.mjs';

const HELP = `npm run claims:nested-encoder -- [options]

  --steps N    steps of 2048 tokens that the encoder is fine-tuned from scratch (default: 600)
  --widths N   steps of 2048 tokens that its widths are trained (default: 400)
  --quick      2 steps, few texts: checks that everything runs; writes no results
  --fresh      train again what an earlier run finished
  --help

Reads sst2/train.tsv, sst2/dev.tsv and tokenizers/bert-base-uncased in the folder that ELASTIFORM_DATA names.`;

const { values: options } = parseArgs({
  options: {
    steps: { type: 'string', default: '600' },
    widths: { type: 'string', default: '400' },
    quick: { type: 'boolean', default: false },
    fresh: { type: 'boolean', default: false },
    help: { type: 'boolean', default: false },
  },
});
if (options.help) {
  console.log(HELP);
  process.exit(0);
}
const data = process.env.ELASTIFORM_DATA ?? '';
const { quick } = options;
const [steps, widthSteps] = quick ? [2, 2] : [Number(options.steps), Number(options.widths)];
if (!existsSync(join(data, 'sst2/train.tsv')) || !(steps > 0 && widthSteps > 0)) {
  console.error(`claims: ELASTIFORM_DATA must have sst2, and steps be positive\n\n${HELP}`);
  process.exit(2);
}
const say = (line) => process.stderr.write(`${line}\n`);
const cache = join(
  import.meta.dirname,
  '../../.cache/claims-nested-encoder',
  quick ? 'quick' : `${steps}-${widthSteps}`,
);
if (options.fresh || quick) rmSync(cache, { recursive: true, force: true });
mkdirSync(cache, { recursive: true });

const textsOf = (file) => [
  ...new Set(
    readFileSync(join(data, 'sst2', file), 'utf8')
      .split('\n')
      .slice(1)
      .map((line) => line.split('\t')[0].trim())
      .filter((text) => text.split(' ').length >= 4),
  ),
];
const training = textsOf('train.tsv');
const seen = new Set(training);
const held = textsOf('dev.tsv').filter((text) => !seen.has(text));
const documents = held.slice(0, quick ? 60 : 2000);
const queries = held.slice(documents.length, documents.length + (quick ? 20 : 500));
const granularities = [0.125, 0.25, 0.5, 1];
const model = {
  ...{ model_type: 'bert', hidden_size: 128, num_hidden_layers: 4, num_attention_heads: 2, intermediate_size: 512 },
  ...{ max_position_embeddings: 128, hidden_act: 'gelu' },
};

/** Runs a step unless an earlier run did. */
async function once(name, marker, make) {
  const dir = join(cache, name);
  if (existsSync(join(dir, marker))) return dir;
  say(`${name} ...`);
  await make(dir);
  return dir;
}
const classifier = await once('classifier', 'model.safetensors', (out) =>
  finetune({
    ...{ model, tokenizer: join(data, 'tokenizers/bert-base-uncased'), out, steps, batchTokens: 2048, seed: 1 },
    data: { kind: 'tsv', files: join(data, 'sst2/train.tsv') },
  }),
);
const rankedOn = { kind: 'documents', documents: training.slice(0, 2000) };
const ranked = await once('ranked', 'elastic_manifest.json', (out) =>
  elastify(classifier, { kind: 'matformer', granularities, rank: 'activation' }, { out, calibration: rankedOn }),
);
const trained = await once('trained', 'elastic_manifest.json', (out) =>
  distill({
    ...{ plan: ranked, out, steps: widthSteps, batchTokens: 2048, seed: 1, optimizer: { lr: 3e-4 } },
    data: { kind: 'documents', documents: training.slice(0, 20000) },
  }),
);

const NEAREST = 10;
const dot = (a, b) => a.reduce((sum, x, d) => sum + x * b[d], 0);
/** The nearest documents of every query, by cosine. */
const nearest = (vectors, index) =>
  vectors.map((vector) => {
    const scores = index.map((document, i) => [dot(vector, document), i]);
    return new Set(
      scores
        .sort((a, b) => b[0] - a[0] || a[1] - b[1])
        .slice(0, NEAREST)
        .map(([, i]) => i),
    );
  });

/** The share of each query's documents that are among the right ones. */
const recallOf = (found, right) =>
  bootstrap(
    found.map((own, q) => ({ hits: [...own].filter((i) => right[q].has(i)).length, all: NEAREST })),
    ({ hits, all }) => hits / all,
    1,
  );

/** Recall of every width: the share of the full query's nearest documents that the slice's has. */
async function measure(dir) {
  const encoder = await loadModel(dir);
  try {
    const embed = (texts, budget) => encoder.embed(texts, { budget, normalize: true, pooling: 'mean' });
    const index = await embed(documents, 'full');
    const full = await embed(queries, 'full');
    const right = nearest(full.vectors, index.vectors);
    const rows = [];
    for (const share of granularities.slice(0, -1)) {
      const budget = { spec: { ffnWidth: share } };
      const slice = await embed(queries, budget);
      const found = nearest(slice.vectors, index.vectors);
      const distances = slice.vectors.map((vector, q) => 1 - dot(vector, full.vectors[q]));
      rows.push({
        ...{ width: share, flops: slice.usage.compute.ratio },
        recall: recallOf(found, right),
        distance: distances.reduce((a, b) => a + b, 0) / distances.length,
        sameSpace: slice.spaceId === index.spaceId,
      });
    }
    return { rows, right };
  } finally {
    await encoder.dispose();
  }
}
say('measuring ...');
const [before, after] = [await measure(ranked), await measure(trained)];
// What training the widths does to the full model itself.
const kept = recallOf(after.right, before.right);
const results = { ranked: before.rows, trained: after.rows, full: kept };

const percent = (value) => `${(value * 100).toFixed(1)} %`;
const interval = ({ value, low, high }) => `${percent(value)} [${percent(low)}, ${percent(high)}]`;
const settings = { ...{ steps, widthSteps, batchTokens: 2048, granularities, nearest: NEAREST }, model };
const counts = { documents: documents.length, queries: queries.length };
const markdown = `# Adaptive retrieval with a nested encoder

A BERT of ${model.num_hidden_layers} layers, ${model.hidden_size} features and ${model.intermediate_size} units a feed-forward, fine-tuned from scratch on SST-2 (${steps} steps of 2048 tokens), makes vectors by
the mean of its features. ${counts.documents} held-out phrases of SST-2 are indexed with the full encoder; ${counts.queries} others are queries, read with a slice.
Recall: the share of the ${NEAREST} documents nearest to the full model's query that are among the ${NEAREST} nearest to the slice's. *Ordered*: units in order of
importance, not trained. *Trained*: by \`distill\` for ${widthSteps} steps of 2048 tokens, at all widths. 95 % bootstrap intervals over queries, of one seed. This
model is small and knows one task; what a width keeps of a large embedding model is another question.

One command: \`npm run claims:nested-encoder\` (${machineFacts().cpu ?? 'one machine'}; no clock was used).

| units | FLOPs of a query | recall, ordered | recall, trained | cosine distance, ordered | trained | space of the full model, ordered | trained |
| --- | --- | --- | --- | --- | --- | --- | --- |
${results.ranked
  .map((row, i) => {
    const other = results.trained[i];
    const cells = [
      ...[percent(row.width), percent(row.flops), interval(row.recall), interval(other.recall)],
      ...[
        row.distance.toFixed(4),
        other.distance.toFixed(4),
        row.sameSpace ? 'yes' : 'no',
        other.sameSpace ? 'yes' : 'no',
      ],
    ];
    return `| ${cells.join(' | ')} |`;
  })
  .join('\n')}

The full model moves as its widths are trained: by its own index and query after that, it keeps ${interval(kept)} of the nearest documents that it had
before.
`;
if (quick) say('everything runs; a quick run writes no results');
else {
  const out = join(import.meta.dirname, '../../results');
  const json = { settings, ...counts, machine: machineFacts(), results };
  writeFileSync(join(out, 'claims-nested-encoder.json'), `${JSON.stringify(json, null, 1)}\n`);
  writeFileSync(join(out, 'claims-nested-encoder.md'), markdown);
}
process.stdout.write(markdown);
