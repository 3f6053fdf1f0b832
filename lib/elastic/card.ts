// Model cards: of an elastic directory, written from its policy, and of a slice of one.

import type { EncoderTask } from '../model/spec.js';
import { axes, axisTraits } from './axes.js';
import { planLength } from './levels.js';
import { type Assembly, stacks } from './modules.js';
import { type ElasticPolicy, type QualityValue, qualityMetric, routedLayers, routerPlaces } from './policy.js';

/**
 * README.md of an elastic directory: where it comes from, its levels with cost and measured quality, how to load it.
 *
 * @param task of an encoder
 */
export function modelCard(policy: ElasticPolicy, task: EncoderTask | null = null): string {
  const { name, revision, license, weightsSha256 } = policy.base;
  const routers = axes.flatMap((axis) => {
    const layers = routedLayers(policy, axis).length;
    return layers > 0 ? [`${axisTraits[axis].title} of ${layers} of ${policy.layers} layers`] : [];
  });
  const corrections = policy.lora && `, corrections of rank ${policy.lora.rank} for ${policy.lora.targets.join(', ')}`;
  const { nested, exits, modules } = policy;
  const fastest = policy.levels.findLast(({ spec }) => spec.exit)?.name;
  const parts = [
    ...(routers.length > 0 ? [`routers for ${routers.join(', ')}`] : []),
    ...(nested
      ? [
          `feed-forwards of ${nested.layers.length} of ${policy.layers} layers that run at any width, a prefix of their units`,
        ]
      : []),
    ...(exits ? [`exits after ${exits.length} of ${policy.layers} layers, at which texts leave that are decided`] : []),
    ...(modules
      ? stacks.map((stack) => `${modules[stack].length} modules of the ${stack}, each a layer that stands for several`)
      : []),
    ...(policy.sourceTokens
      ? [`routers for tokens of the encoder (${Object.keys(policy.sourceTokens.capacity).join(', ')})`]
      : []),
  ];
  const runs = policy.calibration !== null || nested !== undefined || policy.levels.length > 1 || modules !== undefined;
  const chosen = fastest ? `budget: '${fastest}'` : exits ? 'exit: true' : 'budget: 0.8';
  const classify = `const [{ label, compute }] = await model.classify('A joy.', { ${chosen} });`;
  const embed = `const { vectors, spaceId, usage } = await model.embed(['How do I reset it?'], { ${chosen} });`;
  const generate = `const stream = model.generate('Once', { budget: ${policy.calibration ? '0.7' : nested || modules ? '0.8' : "'full'"} });`;
  return `${[
    ...head(policy.base, `${name}, elastic`),
    `The checkpoint of ${name}, unchanged, with ${parts.join('; ')}${corrections ?? ''}. What a call costs is chosen at the call; at the full budget the model is ${name} to the bit.`,
    '',
    ...(runs ? levelTable(policy) : []),
    ...untrained(policy),
    ...['', '## Use', '', '```js', "import { loadModel } from 'elastiform';", ''],
    ...["await using model = await loadModel('.'); // this directory"],
    ...(task === null
      ? [generate, 'console.log(await stream.text, (await stream.usage).compute.ratio);']
      : task === 'sequence-classification'
        ? [classify, 'console.log(label, compute.ratio);']
        : [embed, 'console.log(vectors[0], spaceId, usage.compute.ratio);']),
    ...['```', ''],
    ...['Tools that know nothing of elastic models load it as the checkpoint it was made from.', ''],
    ...['## Origin', '', `- base: ${name}${revision ? `, revision ${revision}` : ''}`],
    `- licence of the base: ${license ?? 'not known'}`,
    `- SHA-256 of its weights: ${weightsSha256}`,
  ].join('\n')}\n`;
}

/** README.md of an extracted slice with `widths` units, without some layers, whose corrections may be `merged` into its weights. */
export function sliceCard(
  base: ElasticPolicy['base'],
  { widths, skipped, merged }: { widths: readonly number[]; skipped: readonly number[]; merged: boolean },
): string {
  const { name, revision, license } = base;
  const alike = widths.every((units) => units === widths[0]);
  const of = alike ? `${widths[0]} units in every layer` : `${widths.join(', ')} units, layer by layer`;
  return `${[
    ...head(base, `A slice of ${name}`),
    `Feed-forwards of ${of}, extracted from ${name}${revision ? `, revision ${revision}` : ''}${merged ? ', its corrections merged in' : ''}.`,
    ...(skipped.length > 0 ? ['', `Layers left out, by their numbers in ${name}: ${skipped.join(', ')}.`] : []),
    '',
    `Licence of the base: ${license ?? 'not known'}.`,
  ].join('\n')}\n`;
}

/** README.md of an assembly that was written out, with so many units in every feed-forward, and corrections merged in. */
export function assemblyCard(
  base: ElasticPolicy['base'],
  { assembly, units, merged }: { assembly: Assembly; units: number; merged: boolean },
): string {
  const { name, revision, license } = base;
  const parts = stacks.map((stack) => `${stack} ${assembly[stack].join(', ')}`).join('; ');
  return `${[
    ...head(base, `${name}, assembled`),
    `Layers and modules of ${name}${revision ? `, revision ${revision}` : ''}: ${parts}. A part such as 2-3 is one layer that was trained to stand for layers 2 to 3. Feed-forwards have ${units} units${merged ? '; corrections of the layers are merged in' : ''}.`,
    '',
    `Licence of the base: ${license ?? 'not known'}.`,
  ].join('\n')}\n`;
}

/** Front matter and title. */
function head({ name, license }: ElasticPolicy['base'], title: string): string[] {
  const spdx = license && !license.startsWith('see ') ? license : 'other';
  return [
    ...['---', `license: ${spdx}`, `base_model: ${JSON.stringify(name)}`, 'tags:', '- elastiform', '---', ''],
    ...[`# ${title}`, ''],
  ];
}

function untrained(policy: ElasticPolicy): string[] {
  if (routerPlaces(policy).length > 0 && !policy.calibration) {
    return ['Its routers are **not trained yet**: train them with `elastiform distill`.'];
  }
  if (!policy.nested || policy.nested.trained) return [];
  return ['', 'Widths below full are **not trained yet**: train them with `elastiform distill`.'];
}

function levelTable({ levels, calibration }: ElasticPolicy): string[] {
  const percent = (share: number): string => `${(share * 100).toFixed(1)} %`;
  const measured = (quality: QualityValue | undefined, show: (value: number) => string): string =>
    quality ? `${show(quality.value)} (${show(quality.lo)} to ${show(quality.hi)})` : 'not measured';
  return [
    '| level | FLOPs | same most likely token as full | KL to full, nats per token |',
    '| --- | --- | --- | --- |',
    ...levels.map(({ name, flopsRatio, quality }) =>
      name === 'full'
        ? '| full | 100 % | 100 % | 0 |'
        : `| ${name} | ${flopsRatio === undefined ? '' : percent(flopsRatio)} | ${measured(quality?.[qualityMetric], percent)} | ${measured(quality?.kl, (value) => value.toFixed(3))} |`,
    ),
    '',
    `FLOPs by formula, for sequences of ${calibration?.sequenceLength ?? planLength} tokens; every answer reports what was counted. Quality with 95 % intervals, measured by \`elastiform eval --record\`.`,
  ];
}
