// Streaming sample-rate conversion: a windowed sinc, evaluated exactly at every output sample.
//
// Output sample n sits at input time n * rateIn / rateOut. That ratio is reduced to step / phases, so the
// fractional part takes `phases` values and each has its own row of filter taps. Positions advance in integers:
// nothing drifts, however long the stream, and the packet size cannot change the result.

const ZERO_CROSSINGS = 48; // on each side; 3 ms of delay at 16 kHz
const KAISER_BETA = 8; // about 80 dB of stop band
// Where the transition band, as wide as the window makes it, ends at the lower of the two Nyquist frequencies.
const ROLLOFF = 0.945;

/** Modified Bessel function of the first kind, order 0 (its power series). */
function bessel0(x) {
  let sum = 1;
  let term = 1;
  for (let k = 1; term > sum * 1e-17; k += 1) {
    term *= (x / (2 * k)) ** 2;
    sum += term;
  }
  return sum;
}

function sinc(x) {
  return x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x);
}

function gcd(a, b) {
  return b === 0 ? a : gcd(b, a % b);
}

/** Rows of taps, one for each fractional position; each row sums to 1, so a constant stays that constant. */
function filterBank(phases, half, cutoff) {
  const taps = 2 * half;
  const bank = new Float64Array(phases * taps);
  const top = bessel0(KAISER_BETA);
  for (let phase = 0; phase < phases; phase += 1) {
    let sum = 0;
    for (let k = 0; k < taps; k += 1) {
      const distance = k - (half - 1) - phase / phases; // in input samples, from the output's position
      const edge = Math.max(0, 1 - (distance / half) ** 2);
      const tap = sinc(cutoff * distance) * (bessel0(KAISER_BETA * Math.sqrt(edge)) / top);
      bank[phase * taps + k] = tap;
      sum += tap;
    }
    for (let k = 0; k < taps; k += 1) bank[phase * taps + k] /= sum;
  }
  return bank;
}

export class Resampler {
  #step; // input samples advanced by `phases` output samples
  #phases;
  #half; // taps on each side of a position
  #bank;
  #buffer = new Float32Array(8192);
  #filled = 0; // samples in the buffer
  #position = 0; // buffer index of the first tap of the next output
  #phase = 0;
  #received = 0;
  #emitted = 0;
  #finished = false;

  /**
   * @param {number} rateIn samples a second, a whole number
   * @param {number} rateOut samples a second, a whole number
   */
  constructor(rateIn, rateOut) {
    if (!Number.isInteger(rateIn) || !Number.isInteger(rateOut) || rateIn <= 0 || rateOut <= 0) {
      throw new RangeError(`got sample rates ${rateIn} and ${rateOut}, expected whole numbers above zero`);
    }
    const divisor = gcd(rateIn, rateOut);
    this.#step = rateIn / divisor;
    this.#phases = rateOut / divisor;
    if (rateIn === rateOut) return;
    const cutoff = ROLLOFF * Math.min(1, rateOut / rateIn); // of the input's Nyquist frequency
    this.#half = Math.ceil(ZERO_CROSSINGS / cutoff);
    this.#bank = filterBank(this.#phases, this.#half, cutoff);
    this.#filled = this.#half - 1; // silence before the first sample
  }

  /**
   * Takes any number of samples and returns those that are ready, possibly none.
   * @param {Float32Array} samples
   * @returns {Float32Array}
   */
  process(samples) {
    if (this.#finished) throw new Error("the resampler is finished; make a new one for a new stream");
    this.#received += samples.length;
    if (this.#bank === undefined) return samples.slice();
    this.#append(samples);
    return this.#convolve(Infinity);
  }

  /**
   * Returns what the filter still holds: the whole stream gives ceil(received * rateOut / rateIn) samples.
   * @returns {Float32Array}
   */
  finish() {
    if (this.#finished || this.#bank === undefined) {
      this.#finished = true;
      return new Float32Array(0);
    }
    this.#finished = true;
    this.#append(new Float32Array(this.#half));
    const total = Math.ceil((this.#received * this.#phases) / this.#step);
    return this.#convolve(total - this.#emitted);
  }

  #append(samples) {
    const kept = this.#filled - this.#position;
    if (kept > 0) this.#buffer.copyWithin(0, this.#position, this.#filled);
    // Going down by a large factor, the next output may lie beyond everything received so far.
    this.#position = Math.max(0, -kept);
    const start = Math.max(0, kept);
    const skip = Math.min(samples.length, this.#position);
    const fresh = samples.subarray(skip);
    this.#position -= skip;
    if (start + fresh.length > this.#buffer.length) {
      const grown = new Float32Array(2 * (start + fresh.length));
      grown.set(this.#buffer.subarray(0, start));
      this.#buffer = grown;
    }
    this.#buffer.set(fresh, start);
    this.#filled = start + fresh.length;
  }

  #convolve(limit) {
    const taps = 2 * this.#half;
    const reachable = this.#filled - taps - this.#position; // how far the first tap may still move
    if (reachable < 0 || limit <= 0) return new Float32Array(0);
    const room = Math.floor(((reachable + 1) * this.#phases) / this.#step) + 1;
    const output = new Float32Array(Math.min(limit, room));
    let count = 0;
    while (count < output.length && this.#position + taps <= this.#filled) {
      const row = this.#phase * taps;
      let sum = 0;
      for (let k = 0; k < taps; k += 1) sum += this.#bank[row + k] * this.#buffer[this.#position + k];
      output[count] = sum;
      count += 1;
      this.#phase += this.#step;
      this.#position += Math.floor(this.#phase / this.#phases);
      this.#phase %= this.#phases;
    }
    this.#emitted += count;
    return output.subarray(0, count);
  }
}
