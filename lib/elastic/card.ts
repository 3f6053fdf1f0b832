// The model card of an elastic directory, written from its policy.
import { axes, axisTraits } from './axes.js';
import { type ElasticPolicy, type QualityValue, qualityMetric, routedLayers } from './policy.js';

/** README.md of an elastic directory: where it comes from, its levels with cost and measured quality, how to load it. */
export function modelCard(policy: ElasticPolicy): string {
  const { name, revision, license, weightsSha256 } = policy.base;
  const spdx = license && !license.startsWith('see ') ? license : 'other';
  const routers = axes.flatMap((axis) => {
    const layers = routedLayers(policy, axis).length;
    return layers > 0 ? [`${axisTraits[axis].title} of ${layers} of ${policy.layers} layers`] : [];
  });
  const corrections = policy.lora && `, corrections of rank ${policy.lora.rank} for ${policy.lora.targets.join(', ')}`;
  const trained = policy.calibration !== null;
  return `${[
    ...['---', `license: ${spdx}`, `base_model: ${JSON.stringify(name)}`, 'tags:', '- elastiform', '---', ''],
    ...[`# ${name}, elastic`, ''],
    `The checkpoint of ${name}, unchanged, with routers for ${routers.join(', ')}${corrections ?? ''}. What a call costs is chosen at the call; at the full budget the model is ${name} to the bit.`,
    '',
    ...(trained ? levelTable(policy) : ['Its routers are **not trained yet**: train them with `elastiform distill`.']),
    ...['', '## Use', '', '```js', "import { loadModel } from 'elastiform';", ''],
    ...["await using model = await loadModel('.'); // this directory"],
    `const stream = model.generate('Once', { budget: ${trained ? '0.7' : "'full'"} });`,
    ...['console.log(await stream.text, (await stream.usage).compute.ratio);', '```', ''],
    ...['Tools that know nothing of elastic models load it as the checkpoint it was made from.', ''],
    ...['## Origin', '', `- base: ${name}${revision ? `, revision ${revision}` : ''}`],
    `- licence of the base: ${license ?? 'not known'}`,
    `- SHA-256 of its weights: ${weightsSha256}`,
  ].join('\n')}\n`;
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
    `FLOPs by formula, for sequences of ${calibration!.sequenceLength} tokens; every answer reports what was counted. Quality with 95 % intervals, measured by \`elastiform eval --record\`.`,
  ];
}
