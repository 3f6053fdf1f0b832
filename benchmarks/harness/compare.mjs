// Agreement of results between libraries.

export function decode(text) {
  const bytes = Buffer.from(text, 'base64');
  return new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
}

/** Log-probabilities: logits up to a constant, which is all that some libraries give. */
export function logSoftmax(logits) {
  const most = logits.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
  const sum = logits.reduce((total, x) => total + Math.exp(x - most), 0);
  const shift = most + Math.log(sum);
  return logits.map((x) => x - shift);
}

export function largestDifference(a, b) {
  if (a.length !== b.length) throw new Error(`compared ${a.length} values with ${b.length}`);
  // A value that is not a number must not look like agreement.
  return a.reduce((most, x, i) => (Math.abs(x - b[i]) <= most ? most : Math.abs(x - b[i])), 0);
}

export const largest = (values) => values.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
