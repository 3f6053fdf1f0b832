// Models for inference tests: a tiny one trained on the spot and made elastic, and golden ones.
import { join } from 'node:path';
import { type DistillConfig, distill } from '../../lib/distill/distill.js';
import { type ElastiformerRecipe, elastify, type Recipe } from '../../lib/elastic/elastify.js';
import { stories, temporaryDirectory, tinyModel } from '../distill/tiny.js';

/** Real checkpoints; tests that need them are skipped without. */
export const data = process.env.ELASTIFORM_DATA;

export interface Directories {
  /** A plain model. */
  backbone: string;
  /** The same with routers that were not trained. */
  plan: string;
  /** The same with trained, calibrated routers. */
  elastic: string;
}

/** A tiny model with routers of tokens, trained. */
export const elasticDirectories = (
  recipe: Partial<ElastiformerRecipe> = {},
  ...more: readonly Recipe[]
): Promise<Directories> => distilledDirectories([{ kind: 'elastiformer', ...recipe }, ...more]);

/** Trains and distils a tiny model, on the CPU whatever device is tested; a few seconds. */
export async function distilledDirectories(
  recipes: readonly Recipe[],
  settings: Partial<DistillConfig> = {},
): Promise<Directories> {
  const root = temporaryDirectory();
  const [backbone, plan, elastic] = ['backbone', 'plan', 'elastic'].map((name) => join(root, name));
  await tinyModel(backbone);
  await elastify(backbone, recipes, { out: plan });
  await distill({
    plan,
    out: elastic,
    device: 'cpu',
    data: { kind: 'documents', documents: stories(120) },
    steps: 30,
    batchTokens: 256,
    sequenceLength: 48,
    optimizer: { lr: 1e-2 },
    calibrationTokens: 1024,
    seed: 2,
    ...settings,
  });
  return { backbone, plan, elastic };
}
