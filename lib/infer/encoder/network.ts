// A loaded encoder: mapped weights and tokenizer on one engine.
import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import type { ElasticPolicy } from '../../elastic/policy.js';
import { type MeasuredOn, Profiles } from '../../elastic/profile.js';
import { readElastic } from '../../elastic/store.js';
import { Checkpoint } from '../../io/safetensors.js';
import { loadTokenizer, type Tokenizer } from '../../io/tokenizer.js';
import { encoderSpecFromConfig } from '../../model/encoder_spec.js';
import { type EncoderTensors, loadEncoderWeights } from '../../model/encoder_weights.js';
import { readSentenceSettings, type SentenceSettings } from '../../model/sentence_transformers.js';
import type { EncoderSpec } from '../../model/spec.js';
import { InvalidArgumentError } from '../../native/errors.js';
import { Engine, loadAddon } from '../../native/index.js';
import { measuredOn } from '../machine.js';
import { checkContext, type ModelStart, type RouterTensors, routerTensors } from '../network.js';
import { owning } from '../owning.js';
import type { LoadOptions } from '../types.js';

export interface EncoderNetwork extends Pick<SentenceSettings, 'pooling' | 'normalize'> {
  readonly dir: string;
  readonly spec: EncoderSpec;
  readonly engine: Engine;
  readonly weights: EncoderTensors;
  readonly policy: ElasticPolicy | null;
  /** Heads of exits by their ids; empty for a plain model. */
  readonly heads: ReadonlyMap<string, RouterTensors>;
  readonly weightBytes: number;
  readonly tokenizer: Tokenizer | null;
  /** Tokens of a text. */
  readonly maxContext: number;
  /** What was measured of this model's levels, here or on other machines. */
  readonly profiles: Profiles;
  /** What times measured now depend on. */
  measuredOn(): MeasuredOn;
  /** Hash of what its features depend on: weights, tokenizer and configuration. */
  fingerprint(): Promise<string>;
  dispose(): void;
}

/**
 * Maps the directory of an encoder. Errors: InvalidFileError or InvalidDataError naming the file and what is wrong with it, InvalidArgumentError for
 * an option that encoders have not or a value out of range, AbortError.
 */
export async function loadEncoder(
  dir: string,
  options: LoadOptions,
  { config, configPath, progress }: ModelStart,
): Promise<EncoderNetwork> {
  for (const name of ['adapter', 'maxLevel', 'maxSequences', 'maxBatchTokens', 'kvCacheBytes'] as const) {
    if (options[name] !== undefined) {
      throw new InvalidArgumentError(`[loadModel] ${name} is for decoders, and ${dir} is an encoder`);
    }
  }
  const sentence = await readSentenceSettings(dir);
  const spec = encoderSpecFromConfig(config, configPath, sentence ? { task: 'feature-extraction' } : {});
  checkContext(spec, options);
  const elastic = await readElastic(dir);

  progress(1);
  return owning(async (own, dispose) => {
    const checkpoint = own(Checkpoint.open(dir));
    const loaded = own(loadEncoderWeights(spec, checkpoint, options.dtype ? { dtype: options.dtype } : {}));
    const heads = new Map(
      [...(elastic?.routers ?? [])].map(([id, router]) => [id, routerTensors(router, spec.hidden, own)]),
    );
    progress(2);
    const tokenizer = existsSync(join(dir, 'tokenizer.json')) ? await loadTokenizer(dir) : null;
    progress(3);
    if (options.threads !== undefined) loadAddon().setThreads(options.threads);
    const engine = own(new Engine(options.device, { activations: options.activations, weights: loaded.dtype }));
    return {
      dir,
      spec,
      engine,
      weights: loaded.weights,
      policy: elastic?.policy ?? null,
      heads,
      weightBytes: loaded.bytes,
      tokenizer,
      maxContext: options.maxContext ?? Math.min(sentence?.maxTokens ?? spec.maxPositions, spec.maxPositions),
      pooling: sentence?.pooling ?? 'mean',
      normalize: sentence?.normalize ?? false,
      profiles: await Profiles.read(dir, elastic?.policy.base.weightsSha256, `elastiform profile ${dir} --data FILE`),
      measuredOn: () => measuredOn(engine, loaded.dtype),
      async fingerprint() {
        const parts = [await checkpoint.sha256(), tokenizer?.sha256 ?? '', JSON.stringify(config)];
        return createHash('sha256').update(parts.join('\n')).digest('hex');
      },
      dispose,
    };
  });
}
