// What distillation trains: routers and corrections of projections, where they lie in one flat vector, and back.
import {
  initialLora,
  type Lora,
  loraInputs,
  loraOfParameters,
  loraParameters,
  loraParameterValue,
} from '../elastic/lora.js';
import { type ElasticPolicy, type Router, type Routing, routerPlaces } from '../elastic/policy.js';
import type { ModelSpec } from '../model/spec.js';
import { type ParameterPlan, planOf } from '../model/weights.js';
import { InvalidDataError } from '../native/errors.js';
import type { Random } from './random.js';
import type { Trainable } from './trainable.js';

type Trained = Routing & Pick<ElasticPolicy, 'hidden' | 'lora'>;

/**
 * Two groups: weights of routers, which decay, and their biases; then the matrices of corrections.
 *
 * @param loraLrScale learning rate of corrections over that of routers
 */
export function trainablePlan(policy: Trained, spec: ModelSpec, loraLrScale = 1): ParameterPlan {
  const routers = routerPlaces(policy).map(({ id, outputs }) => routerSlots(id, policy.hidden, outputs));
  return joinedPlans([
    { plan: planOf(routers.flat()), lrScale: 1 },
    { plan: planOf(loraParameters(policy, spec)), lrScale: loraLrScale },
  ]);
}

/** Weight and bias of a router as parameters. */
export const routerSlots = (id: string, hidden: number, outputs: number) => [
  { name: `${id}.weight`, shape: [outputs, hidden] },
  { name: `${id}.bias`, shape: [outputs] },
];

/** Plans end to end, each a group with a factor of its own for the learning rate; empty ones are left out. */
export function joinedPlans(plans: readonly { plan: ParameterPlan; lrScale: number }[]): ParameterPlan {
  let size = 0;
  const groups: NonNullable<ParameterPlan['groups']>[number][] = [];
  const parameters = plans.flatMap(({ plan, lrScale }) => {
    const offset = size;
    size += plan.size;
    if (plan.size > 0) groups.push({ offset, size: plan.size, decayCount: plan.decayCount, lrScale });
    return plan.parameters.map((parameter) => ({ ...parameter, offset: offset + parameter.offset }));
  });
  return { parameters, size, decayCount: plans[0].plan.decayCount, groups };
}

/**
 * The vector that training starts from: what is there already, new corrections where there are none.
 * Errors: InvalidDataError when a correction has another rank than the policy says.
 */
export function startVector(
  { size, parameters }: ParameterPlan,
  policy: Trained,
  spec: ModelSpec,
  { routers, lora }: { routers: ReadonlyMap<string, Router>; lora: Lora | null },
  random: Random,
): Float32Array {
  const flat = new Float32Array(size);
  const offsets = new Map(parameters.map(({ name, offset }) => [name, offset]));
  for (const [id, { weight, bias }] of routers) {
    flat.set(weight, offsets.get(`${id}.weight`)!);
    flat.set(bias, offsets.get(`${id}.bias`)!);
  }
  const { rank } = policy.lora ?? {};
  for (const [id, matrices] of lora ?? []) {
    if (matrices.rank !== rank) {
      throw new InvalidDataError(`[distill] the adapter's ${id} has rank ${matrices.rank}, the policy says ${rank}`);
    }
  }
  for (const parameter of loraParameters(policy, spec)) {
    const value =
      (lora && loraParameterValue(parameter, lora)) ??
      initialLora(parameter, loraInputs(parameter), () => random.uniform());
    flat.set(value, offsets.get(parameter.name)!);
  }
  return flat;
}

/** Routers among parameters, by their ids. */
export const trainedRouters = (
  values: ReadonlyMap<string, Float32Array>,
  routers: readonly { readonly id: string }[],
): Map<string, Router> =>
  new Map(routers.map(({ id }) => [id, { weight: values.get(`${id}.weight`)!, bias: values.get(`${id}.bias`)! }]));

/** Corrections as they are now; null when the policy has none. */
export function trainedLora(trainable: Trainable, policy: Trained, spec: ModelSpec): Lora | null {
  if (!policy.lora) return null;
  const values = trainable.values();
  return loraOfParameters(loraParameters(policy, spec), policy.lora.rank, (name) => values.get(name)!);
}
