// The programs of an encoder: its layers, whole or from one exit to the next, and what comes after them.
import { exitId } from '../../elastic/exits.js';
import { nestedWidth, widthDims } from '../../elastic/nested.js';
import { routerNodes } from '../../elastic/rows.js';
import { type Dim, Graph, type Node, Program } from '../../graph/index.js';
import { encoderEmbeddings, encoderLayers, exitLogits, headLogits, type Pooling, pool } from '../../model/encoder.js';
import { bindEncoder, type EncoderNodes } from '../../model/encoder_weights.js';
import { type EncoderPart, encoderFlops } from '../../model/flops.js';
import { selectEverything } from '../../model/select.js';
import { ComputeMeter } from '../compute.js';
import type { EncoderNetwork } from './network.js';
import { embeddingFeeds, type Row, rowOffsets } from './rows.js';

/** Rows of a run of several texts, or of one text that is longer: memory is planned for as many. */
const packedRows = 4096;
/** Texts of a run. */
export const packedTexts = 256;

/** What comes after the layers of a program. */
export type End = 'classes' | 'exit' | 'tokens' | 'features' | Pooling;
const ofTexts = (end: End): boolean => end !== 'tokens' && end !== 'features';

/** Layers that run together, `to` left out, and what comes after them; default all layers. */
export interface Stage {
  readonly from?: number;
  readonly to?: number;
  readonly end: End;
}

/** A run of a stage. */
export interface StageRun {
  /** What the end computes, row by row. */
  readonly values: Float32Array;
  /** After the last layer of a stage with an exit, f32 [tokens, hidden]. */
  readonly residual: Float32Array | null;
  /** What each row cost, FLOPs: what the kernels counted, divided by formula. */
  readonly flops: readonly number[];
  /** Shares of the stage's layers, [layers] each; 0 for others. */
  readonly layersRun: { attn: Float32Array; mlp: Float32Array };
  readonly ms: number;
}

/** Programs by stage, compiled when first needed. Their runs share one memory, that of the engine. */
export class EncoderPrograms {
  readonly #network: EncoderNetwork;
  readonly #programs = new Map<string, Program>();

  constructor(network: EncoderNetwork) {
    this.#network = network;
  }

  /** Rows and texts that a run may have. */
  limits(end: End): { rows: number; segments: number } {
    const { maxContext } = this.#network;
    return ofTexts(end)
      ? { rows: Math.max(maxContext, packedRows), segments: packedTexts }
      : { rows: maxContext, segments: 1 };
  }

  /**
   * @param options.residual of the rows after the layer before `from`; none where that is the first
   * @param options.widths units of every layer's feed-forward, [layers]; null: all
   */
  async run(
    stage: Stage,
    rows: readonly Row[],
    { residual, widths, signal }: { residual?: Float32Array; widths: readonly number[] | null; signal?: AbortSignal },
  ): Promise<StageRun> {
    const { spec, policy } = this.#network;
    const { end, from = 0, to = spec.layers } = stage;
    const offsets = rowOffsets(rows);
    const tokens = offsets[rows.length];
    const feeds = {
      ...(residual ? { residual } : embeddingFeeds(rows, spec.encoder.tokenTypes)),
      offsets,
      ...(ofTexts(end) && {
        token: offsets.slice(0, -1).map((first, s) => (end === 'last' ? offsets[s + 1] - 1 : first)),
      }),
    };
    const dims = {
      ...{ rows: tokens, segments: rows.length, offsets: rows.length + 1 },
      ...widthDims(policy?.nested, widths, spec.ffn),
    };
    const started = performance.now();
    const result = await this.#program({ from, to, end }).run({ dims, feeds, signal });
    const ms = performance.now() - started;
    const meter = new ComputeMeter(spec);
    meter.add(result, tokens);
    return {
      values: result.outputs[end] as Float32Array,
      residual: (result.outputs.residual as Float32Array | undefined) ?? null,
      flops: this.#divided(meter.flops, rows, end, { from, to, widths }),
      layersRun: meter.layersRun(),
      ms,
    };
  }

  /** FLOPs of a row by formula; default of all of the model. */
  flops(end: End, row: Row, part: EncoderPart = {}): number {
    const last = end === 'classes' || end === 'tokens' ? 'head' : end === 'exit' ? end : 'none';
    return encoderFlops(this.#network.spec, [row.ids.length], last, part);
  }

  dispose(): void {
    for (const program of this.#programs.values()) program.dispose();
    this.#programs.clear();
  }

  /** Every row enters every sub-layer, so the formula divides what was counted. */
  #divided(counted: number, rows: readonly Row[], end: End, part: EncoderPart): number[] {
    const costs = rows.map((row) => this.flops(end, row, part));
    const total = costs.reduce((sum, cost) => sum + cost, 0);
    return costs.map((cost) => (total > 0 ? Math.round((counted * cost) / total) : 0));
  }

  #program({ from, to, end }: Required<Stage>): Program {
    const key = `${from} ${to} ${end}`;
    const known = this.#programs.get(key);
    if (known) return known;
    const { spec, weights, engine, policy } = this.#network;
    const limits = this.limits(end);
    const graph = new Graph();
    const [rows, segments] = [graph.dim('rows', limits.rows), graph.dim('segments', limits.segments)];
    const feed = (name: string, size: Dim) => graph.feed(name, 'i32', [size]);
    const nodes = bindEncoder(graph, weights);
    const offsets = feed('offsets', graph.dim('offsets', limits.segments + 1));
    const positions = feed('positions', rows);
    const begin = () =>
      encoderEmbeddings(graph, spec, nodes, {
        ...{ ids: feed('ids', rows), positions },
        ...(spec.encoder.tokenTypes > 0 && { types: feed('types', rows) }),
      });
    const start = from === 0 ? begin() : graph.feed('residual', 'f32', [rows, spec.hidden]);
    const selector = policy?.nested
      ? { ...selectEverything, width: nestedWidth(graph, policy.nested, spec.ffn) }
      : selectEverything;
    const x = encoderLayers(graph, spec, nodes, start, { positions, offsets }, selector, { from, to });
    if (end === 'exit') graph.output('residual', x);
    const token = ofTexts(end) ? feed('token', segments) : null;
    graph.output(end, this.#end(graph, { to, end }, nodes, x, offsets, token));
    const program = Program.compile(graph, engine);
    this.#programs.set(key, program);
    return program;
  }

  #end(
    graph: Graph,
    { to, end }: Pick<Required<Stage>, 'to' | 'end'>,
    nodes: EncoderNodes,
    x: Node,
    offsets: Node,
    token: Node | null,
  ): Node {
    const { spec, heads } = this.#network;
    if (end === 'features') return x;
    if (end === 'classes' || end === 'tokens') return headLogits(graph, spec, nodes, x, token);
    if (end !== 'exit') return pool(graph, x, offsets, token!, end);
    return exitLogits(graph, routerNodes(graph, heads)(exitId(to - 1)), x, token!);
  }
}
