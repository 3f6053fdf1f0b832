// Keeps what an evaluation measured of a model's levels in the model's directory, for budgets by quality.
import { type QualityValue, qualityMetric } from '../../elastic/policy.js';
import { readElastic, writeLevels } from '../../elastic/store.js';
import { InvalidArgumentError } from '../../native/errors.js';
import { type EvalReport, isElastic } from './evaluate.js';
import type { Measured } from './statistics.js';

/** Fewer sequences have no interval worth the name. */
const fewestSequences = 8;

/**
 * Writes agreement and KL of every level that a report has by name into an elastic directory, over earlier values.
 *
 * @returns the names of those levels
 * @throws InvalidArgumentError when the directory is not elastic, or the report has no level of it below full or too few
 * sequences for an interval; errors of readElastic and writeElastic.
 */
export async function recordQuality(dir: string, report: EvalReport): Promise<string[]> {
  if (report.sequences < fewestSequences) {
    throw new InvalidArgumentError(
      `[eval] quality needs at least ${fewestSequences} sequences for its interval, got ${report.sequences}; give more text or shorter sequences`,
    );
  }
  const elastic = await readElastic(dir);
  if (!elastic) throw new InvalidArgumentError(`[eval] ${dir} is not an elastic directory`);
  const { levels } = elastic.policy;
  const entry = ({ value, low, high }: Measured): QualityValue => ({ value, lo: low, hi: high, n: report.tokens });
  const measured = new Map(
    report.levels.flatMap(({ method, budget, agreement, kl }) =>
      isElastic(method) && levels.some(({ name }) => name === budget)
        ? [[budget as string, { [qualityMetric]: entry(agreement), kl: entry(kl) }] as const]
        : [],
    ),
  );
  if (measured.size === 0) {
    throw new InvalidArgumentError(`[eval] the report has no level of ${dir} by name, so there is nothing to record`);
  }
  await writeLevels(
    dir,
    levels.map((level) => {
      const quality = measured.get(level.name);
      return quality ? { ...level, quality } : level;
    }),
  );
  return [...measured.keys()];
}
