// What values between ops are kept as on a GPU: bf16 where this build can.
import { Engine } from '../../dist/native/index.js';

/** Whether engines take `activations`: those of the CPU then refuse bf16, and otherwise the option says nothing. */
export function takesBf16() {
  try {
    new Engine('cpu', { activations: 'bf16' }).dispose();
    return false;
  } catch {
    return true;
  }
}
