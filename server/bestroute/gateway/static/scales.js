// From values to places in a chart, and the values that are written beside it. Pure.

export function linear([low, high], [from, to]) {
  const span = high - low || 1;
  return (value) => from + ((value - low) / span) * (to - from);
}

export function logarithmic([low, high], range) {
  const scale = linear([Math.log(low), Math.log(high)], range);
  return (value) => scale(Math.log(value));
}

/** Round values from low to high, about so many. */
export function ticks([low, high], about) {
  const rough = (high - low) / about;
  if (!(rough > 0)) return [low];
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((times) => times * unit).find((each) => each >= rough);
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, index) => (first + index) * step);
}

/** Powers of ten from low to high, with values between where those are few. */
export function decades([low, high]) {
  const between = Math.log10(high / low) < 2 ? [1, 2, 5] : [1];
  const found = [];
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power += 1) {
    for (const times of between) {
      const value = times * 10 ** power;
      if (value >= low && value <= high) found.push(value);
    }
  }
  return found;
}

/** The first place for a box that is inside and touches none of those taken, if there is one. */
export function free(places, taken, edge) {
  const clear = (box) =>
    box.left >= edge.left &&
    box.right <= edge.right &&
    taken.every(
      (other) =>
        box.right < other.left ||
        box.left > other.right ||
        box.bottom < other.top ||
        box.top > other.bottom,
    );
  return places.find(clear);
}
