// Stands in for vitest on a GPU host: what our tests import of it, on node:test and @vitest/expect.
import { after, afterEach, before, beforeEach, describe as nodeDescribe, test as nodeTest } from 'node:test';
import { format } from 'node:util';
import {
  ASYMMETRIC_MATCHERS_OBJECT,
  addCustomEqualityTesters,
  customMatchers,
  getState,
  JestAsymmetricMatchers,
  JestChaiExpect,
  JestExtend,
  setState,
} from '@vitest/expect';
import * as chai from 'chai';

for (const plugin of [JestExtend, JestChaiExpect, JestAsymmetricMatchers]) chai.use(plugin);

export const expect = (value, message) => chai.expect(value, message);
Object.assign(expect, chai.expect, globalThis[ASYMMETRIC_MATCHERS_OBJECT]);
expect.getState = () => getState(expect);
expect.setState = (state) => setState(state, expect);
setState({ assertionCalls: 0, isExpectingAssertions: false, expectedAssertionsNumber: null }, expect);
expect.assert = chai.assert;
expect.extend = (matchers) => chai.expect.extend(expect, matchers);
expect.addEqualityTesters = addCustomEqualityTesters;
expect.extend(customMatchers);

const settings = { timeout: Number(process.env.ELASTIFORM_TEST_TIMEOUT ?? 60_000) };

/** The title of one row of `each`: as many of its values as the title has placeholders. */
function title(name, values) {
  const wanted = name.replaceAll('%%', '').match(/%[sdifjoOc]/g)?.length ?? 0;
  return wanted ? format(name, ...values.slice(0, wanted)) : name;
}

// vitest takes the options, or the timeout, before or after the body.
function parse(args) {
  const body = args.find((arg) => typeof arg === 'function');
  const given = args.find((arg) => arg !== body && arg !== undefined);
  const options = typeof given === 'number' ? { timeout: given } : (given ?? {});
  return { body, options: { timeout: options.timeout ?? settings.timeout, skip: options.skip ?? false } };
}

function family(register) {
  const make = (skip) => {
    const add = (name, ...args) => {
      const { body, options } = parse(args);
      register(String(name?.name ?? name), { ...options, skip: skip || options.skip }, body);
    };
    add.each = (rows) => {
      const lists = rows.every(Array.isArray);
      return (name, ...args) => {
        const { body, options } = parse(args);
        for (const row of rows) {
          const values = lists ? row : [row];
          register(title(name, values), { ...options, skip: skip || options.skip }, () => body(...values));
        }
      };
    };
    return add;
  };
  const all = make(false);
  all.concurrent = all;
  all.sequential = all;
  all.skip = make(true);
  all.skipIf = (condition) => make(Boolean(condition));
  all.runIf = (condition) => make(!condition);
  return all;
}

// The body gets no arguments: node:test would take one for a callback.
export const test = family((name, { timeout, skip }, body) => nodeTest(name, { timeout, skip }, () => body()));
export const it = test;
export const describe = family((name, { skip }, body) => nodeDescribe(name, { skip }, () => body()));
export const suite = describe;

const hook = (register) => (body, timeout) => register(() => body(), { timeout: timeout ?? settings.timeout });
export const beforeAll = hook(before);
export const afterAll = hook(after);
const eachBefore = hook(beforeEach);

const eachAfter = hook(afterEach);

export { eachAfter as afterEach, eachBefore as beforeEach };

export const vi = {
  setConfig({ testTimeout }) {
    if (testTimeout) settings.timeout = testTimeout;
  },
};
