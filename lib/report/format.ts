// Numbers as the report shows them.

/** With about four significant digits. */
export function show(value: number): string {
  return value.toFixed(Math.abs(value) >= 10 ? 2 : Math.abs(value) >= 1 ? 3 : 4);
}

export function percent(share: number, digits = 1): string {
  return `${(share * 100).toFixed(digits)} %`;
}

export function count(value: number): string {
  return value.toLocaleString('en-US');
}

export function budgetName(budget: number | string): string {
  return typeof budget === 'number' ? `budget ${budget}` : `level ${budget}`;
}
