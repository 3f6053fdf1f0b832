// ONNX graphs as protocol buffers: the few messages and encodings that the benchmark models need.

export const FLOAT = 1;
export const INT32 = 6;
export const INT64 = 7;

// Protocol buffers: the four encodings that ONNX needs.
function varint(value) {
  const bytes = [];
  for (let v = BigInt.asUintN(64, BigInt(value)); ; v >>= 7n) {
    if (v < 128n) {
      bytes.push(Number(v));
      return Buffer.from(bytes);
    }
    bytes.push(Number(v & 127n) | 128);
  }
}
export const integer = (field, value) => Buffer.concat([varint(field << 3), varint(value)]);
const bytes = (field, value) => Buffer.concat([varint((field << 3) | 2), varint(value.length), value]);
export const text = (field, value) => bytes(field, Buffer.from(value));
export const message = (field, ...parts) => bytes(field, Buffer.concat(parts));
function float(field, value) {
  const four = Buffer.alloc(4);
  four.writeFloatLE(value);
  return Buffer.concat([varint((field << 3) | 5), four]);
}

function attribute(name, value) {
  const [type, encoded] = value instanceof Float32Array ? [1, float(2, value[0])] : [2, integer(3, value)];
  return message(5, text(1, name), encoded, integer(20, type));
}

/** A step of a graph. */
export function node(op, inputs, outputs, attributes = {}, domain = '') {
  return message(
    1,
    ...inputs.map((name) => text(1, name)),
    ...outputs.map((name) => text(2, name)),
    text(3, outputs[0]),
    text(4, op),
    ...Object.entries(attributes).map(([name, value]) => attribute(name, value)),
    text(7, domain),
  );
}

/** An input (field 11) or output (12) of a graph. */
export function valueInfo(field, name, type, dims) {
  const shape = dims.map((d) => message(1, typeof d === 'string' ? text(2, d) : integer(1, d)));
  return message(field, text(1, name), message(2, message(1, integer(1, type), message(2, ...shape))));
}

/** @param entry shape, and where the bytes are in `location` */
export function externalTensor(name, entry, location) {
  const pair = (key, value) => message(13, text(1, key), text(2, value));
  return message(
    5,
    ...entry.shape.map((d) => integer(1, d)),
    integer(2, FLOAT),
    text(8, name),
    pair('location', location),
    pair('offset', String(entry.offset)),
    pair('length', String(entry.bytes)),
    integer(14, 1),
  );
}

export function int64Tensor(name, values, dims) {
  const raw = Buffer.alloc(8 * values.length);
  for (const [i, v] of values.entries()) raw.writeBigInt64LE(BigInt(v), 8 * i);
  return message(5, ...dims.map((d) => integer(1, d)), integer(2, INT64), text(8, name), bytes(9, raw));
}

/** The bytes of a model of these nodes, tensors, inputs and outputs. */
export function onnxModel(name, parts) {
  return Buffer.concat([
    integer(1, 9), // IR version
    text(2, 'elastiform-benchmarks'),
    message(7, text(2, name), ...parts),
    message(8, text(1, ''), integer(2, 18)),
    message(8, text(1, 'com.microsoft'), integer(2, 1)),
  ]);
}
