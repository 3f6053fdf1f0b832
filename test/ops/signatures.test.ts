// Every op has a builder, and both sides agree on its name, operands, outputs and attributes.
import { expect, test } from 'vitest';
import { opTable } from '../../lib/graph/index.js';
import { loadAddon } from '../../lib/native/index.js';
import { references } from './reference.js';

const compact = (signature: string): string => signature.replace(/\s+/g, ' ').trim();

test('the ops of the graph are the ops of the addon', () => {
  const addon = loadAddon();
  const names = addon.opNames();
  expect([...opTable.keys()].sort()).toEqual([...names].sort());
  const [signatures, attributes] = [addon.opSignatures(), addon.opAttributes()];
  names.forEach((name, i) => {
    const op = opTable.get(name)!;
    expect(compact(op.text), name).toBe(compact(signatures[i]));
    expect(op.attributes, name).toEqual(attributes[i]);
  });
});

test('every op has a float64 reference', () => {
  expect(Object.keys(references).sort()).toEqual([...opTable.keys()].sort());
});
