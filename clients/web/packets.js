// Samples in, fixed-size packets of 16-bit samples out.

/** Rounds a sample in [-1, 1] to 16 bits, clipping what lies outside. */
export function toInt16(sample) {
  return Math.max(-32768, Math.min(32767, Math.round(sample * 32768)));
}

export class Packetizer {
  #packet;
  #filled = 0;

  /** @param {number} size samples in a packet */
  constructor(size) {
    this.#packet = new Int16Array(size);
  }

  /**
   * @param {Float32Array} samples in [-1, 1]
   * @returns {Int16Array[]} the packets that became full
   */
  push(samples) {
    const full = [];
    for (const sample of samples) {
      this.#packet[this.#filled] = toInt16(sample);
      this.#filled += 1;
      if (this.#filled === this.#packet.length) {
        full.push(this.#packet);
        this.#packet = new Int16Array(this.#packet.length);
        this.#filled = 0;
      }
    }
    return full;
  }

  /** @returns {Int16Array} the last, shorter packet; empty when nothing is left */
  finish() {
    const rest = this.#packet.slice(0, this.#filled);
    this.#filled = 0;
    return rest;
  }
}

/**
 * How loud a packet is, in dB below full scale.
 * @param {Int16Array} packet
 * @returns {{rms: number, peak: number}} -Infinity for digital silence
 */
export function level(packet) {
  let squares = 0;
  let peak = 0;
  for (const sample of packet) {
    squares += sample * sample;
    peak = Math.max(peak, Math.abs(sample));
  }
  const decibel = (amplitude) => 20 * Math.log10(amplitude / 32768);
  return { rms: decibel(Math.sqrt(squares / Math.max(1, packet.length))), peak: decibel(peak) };
}
