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
import type { ParameterPlan } from '../model/weights.js';
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
  let offset = 0;
  const place = (name: string, shape: readonly number[], decay: boolean) => {
    const size = shape.reduce((product, n) => product * n, 1);
    offset += size;
    return { name, shape, offset: offset - size, size, decay };
  };
  const routers = routerPlaces(policy);
  const weights = routers.map(({ id, outputs }) => place(`${id}.weight`, [outputs, policy.hidden], true));
  const decayCount = offset;
  const biases = routers.map(({ id, outputs }) => place(`${id}.bias`, [outputs], false));
  const routed = { offset: 0, size: offset, decayCount, lrScale: 1 };
  const lora = loraParameters(policy, spec).map(({ name, shape }) => place(name, shape, true));
  const size = offset - routed.size;
  const corrections = { offset: routed.size, size, decayCount: size, lrScale: loraLrScale };
  const groups = [routed, corrections].filter((group) => group.size > 0);
  return { parameters: [...weights, ...biases, ...lora], size: offset, decayCount, groups };
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

/** Routers as they are now. */
export function trainedRouters(trainable: Trainable, policy: Routing): Map<string, Router> {
  const values = trainable.values();
  return new Map(
    routerPlaces(policy).map(({ id }) => [
      id,
      { weight: values.get(`${id}.weight`)!, bias: values.get(`${id}.bias`)! },
    ]),
  );
}

/** Corrections as they are now; null when the policy has none. */
export function trainedLora(trainable: Trainable, policy: Trained, spec: ModelSpec): Lora | null {
  if (!policy.lora) return null;
  const values = trainable.values();
  return loraOfParameters(loraParameters(policy, spec), policy.lora.rank, (name) => values.get(name)!);
}
