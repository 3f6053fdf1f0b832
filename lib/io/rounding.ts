// The nearest values of narrower floating types, as bits; ties go to even.

/** The values as they are stored in a type. */
export function rounded(values: Float32Array, dtype: 'f32' | 'bf16' | 'f16'): Float32Array | Uint16Array {
  if (dtype === 'f32') return values;
  return dtype === 'bf16' ? toBf16(values) : toF16(values);
}

/** bfloat16 of each value. */
export function toBf16(values: Float32Array): Uint16Array {
  const bits = new Uint32Array(values.buffer, values.byteOffset, values.length);
  return Uint16Array.from(bits, (b) => (b + 0x7fff + ((b >>> 16) & 1)) >>> 16);
}

/** IEEE half precision of each finite value; what is too large becomes infinite. */
export function toF16(values: Float32Array): Uint16Array {
  return Uint16Array.from(values, (value) => {
    const sign = value < 0 || Object.is(value, -0) ? 0x8000 : 0;
    const magnitude = Math.abs(value);
    if (magnitude >= 65520) return sign | 0x7c00;
    // Halves are whole multiples of `step`: of 2^-24 below 2^-14, else of 2^-10 of their power of two.
    const exponent = Math.max(Math.floor(Math.log2(magnitude)), -14);
    const power = magnitude < 2 ** exponent && exponent > -14 ? exponent - 1 : exponent;
    const step = 2 ** (power - 10);
    const count = magnitude / step;
    const floor = Math.floor(count);
    const rest = count - floor;
    const rounded = rest > 0.5 || (rest === 0.5 && floor % 2 === 1) ? floor + 1 : floor;
    // A count of 1024 or more has the implicit bit, which the exponent's field makes up for; 2048 carries into it.
    return sign | ((power + 14) * 1024 + rounded);
  });
}
