// Batches in programs: the feeds and dims every training program takes, and the texts a config asks for.
import type { Graph } from '../graph/index.js';
import { InvalidArgumentError } from '../native/errors.js';
import { type Batch, type DataSource, readDocuments, type Sequences, splitHeldOut, type TrainingData } from './data.js';

/** Declares dims and feeds of a batch: `ids`, `positions` i32 [rows], `offsets` i32 [segments + 1]. */
export function batchInputs(graph: Graph, batchTokens: number) {
  const rows = graph.dim('rows', batchTokens);
  const segments = graph.dim('segments', batchTokens);
  return {
    rows,
    segments,
    ids: graph.feed('ids', 'i32', [rows]),
    positions: graph.feed('positions', 'i32', [rows]),
    offsets: graph.feed('offsets', 'i32', [graph.dim('ends', batchTokens + 1)]),
  };
}

/** Values of those dims and feeds. */
export function batchRun(batch: Omit<Sequences, 'targets'>) {
  const segments = batch.offsets.length - 1;
  return {
    dims: { rows: batch.ids.length, segments, ends: segments + 1 },
    feeds: { ids: batch.ids, positions: batch.positions, offsets: batch.offsets },
  };
}

/** Every batch of the data once, in the order of the documents. */
export function* wholeEpoch<B>(data: TrainingData<B>, rows: number): Generator<B> {
  for (let cursor = { epoch: 0, segment: 0 }; cursor.epoch === 0; ) {
    const next = data.next(cursor, rows, null);
    yield next.batch;
    cursor = next.cursor;
  }
}

/** The first batches of the data, shuffled by seed 0. */
export function* firstShare<B>(data: TrainingData<B>, rows: number, count: number): Generator<B> {
  let cursor = { epoch: 0, segment: 0 };
  for (let i = 0; i < count; i++) {
    const next = data.next(cursor, rows, 0);
    yield next.batch;
    cursor = next.cursor;
  }
}

/** Shuffled batches of the data until they hold `tokens`, or all of it. */
export function firstBatches<B extends Pick<Batch, 'ids'>>(
  data: Pick<TrainingData<B>, 'next'>,
  rows: number,
  tokens: number,
  seed: number,
): B[] {
  const batches: B[] = [];
  let cursor = { epoch: 0, segment: 0 };
  for (let count = 0; count < tokens && cursor.epoch === 0; ) {
    const next = data.next(cursor, rows, seed);
    batches.push(next.batch);
    count += next.batch.ids.length;
    cursor = next.cursor;
  }
  return batches;
}

/**
 * Reads the training and held-out documents of a config: `evalData`, else the share `heldOut` of the data, else none.
 * Errors: those of readDocuments and splitHeldOut; InvalidArgumentError when both are given.
 */
export async function trainingTexts(
  api: string,
  config: { data: DataSource; evalData?: DataSource; heldOut?: number; seed?: number },
): Promise<{ train: readonly string[]; heldOut: readonly string[] | null }> {
  if (config.evalData && config.heldOut !== undefined) {
    throw new InvalidArgumentError(`[${api}] give evalData or heldOut, not both`);
  }
  const documents = await readDocuments(config.data);
  if (config.heldOut !== undefined) return splitHeldOut(documents, config.heldOut, config.seed ?? 0);
  return { train: documents, heldOut: config.evalData ? await readDocuments(config.evalData) : null };
}
