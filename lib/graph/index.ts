// Graphs of ops, their gradients, and their lowering to programs.
export { type GradientOptions, gradients } from './autodiff.js';
export { boundOf, type Dim, formatShape, type Shape, type Size, sameShape } from './dims.js';
export { Graph, type Node, type Step } from './graph.js';
export { KeptPrograms } from './kept_programs.js';
export { opTable } from './op.js';
export * from './ops/index.js';
export { Program, type RunOptions, type RunResult } from './program.js';
