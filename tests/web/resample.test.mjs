// The page's resampler against sounds that are known exactly at any sampling rate.

import assert from "node:assert/strict";
import test from "node:test";

import { Resampler } from "../../clients/web/resample.js";

const OUT = 16000;
const RATES = [8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000, 88200, 96000, 192000];

/** A sum of sines, sampled at `rate`. */
function tones(frequencies, rate, seconds) {
  const samples = new Float32Array(Math.round(rate * seconds));
  for (let n = 0; n < samples.length; n += 1) {
    for (const [k, hertz] of frequencies.entries()) {
      samples[n] += (0.9 / frequencies.length) * Math.sin((2 * Math.PI * hertz * n) / rate + k);
    }
  }
  return samples;
}

function resample(samples, rate, sizes = [samples.length]) {
  const resampler = new Resampler(rate, OUT);
  const parts = [];
  for (let at = 0, k = 0; at < samples.length; k += 1) {
    const size = sizes[k % sizes.length];
    parts.push(resampler.process(samples.subarray(at, at + size)));
    at += size;
  }
  parts.push(resampler.finish());
  const whole = new Float32Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

/** Root mean square of a - b in dB, leaving out the ends, where the sines begin and stop abruptly. */
function difference(a, b, margin = 400) {
  let squares = 0;
  let count = 0;
  for (let n = margin; n < Math.min(a.length, b.length) - margin; n += 1) {
    squares += (a[n] - b[n]) ** 2;
    count += 1;
  }
  assert.ok(count > 1000);
  return 10 * Math.log10(squares / count);
}

for (const rate of RATES) {
  test(`${rate} Hz: speech frequencies come out as though sampled at 16 kHz`, () => {
    const edge = 0.89 * Math.min(rate, OUT) * 0.5;
    const frequencies = [110, 440, 1000, 2500, 3500, edge].filter((hertz) => hertz <= edge);
    const error = difference(resample(tones(frequencies, rate, 1), rate), tones(frequencies, OUT, 1));
    assert.ok(error < -75, `error ${error.toFixed(1)} dB`);
  });

  test(`${rate} Hz: the packet size changes nothing, bit for bit`, () => {
    const samples = tones([300, 1234, 3456], rate, 0.3);
    const whole = resample(samples, rate);
    for (const sizes of [[1], [128], [7, 0, 1000, 3], [4096]]) {
      assert.deepEqual(resample(samples, rate, sizes), whole, `sizes ${sizes}`);
    }
  });

  test(`${rate} Hz: as many samples as the duration asks for`, () => {
    for (const length of [0, 1, 2, 127, 12345]) {
      const produced = resample(new Float32Array(length), rate).length;
      assert.equal(produced, Math.ceil((length * OUT) / rate), `${length} samples in`);
    }
  });
}

for (const [rate, hertz] of [[48000, 8050], [48000, 12000], [44100, 9000], [96000, 30000]]) {
  test(`${rate} Hz: ${hertz} Hz, which 16 kHz cannot hold, is not folded back`, () => {
    const heard = difference(resample(tones([hertz], rate, 1), rate), new Float32Array(OUT));
    assert.ok(heard < -75, `${heard.toFixed(1)} dB left`);
  });
}

test("a constant stays that constant", () => {
  const heard = resample(new Float32Array(48000).fill(0.5), 48000).subarray(200, -200);
  for (const sample of heard) assert.ok(Math.abs(sample - 0.5) < 1e-6, `got ${sample}`);
});

test("a finished resampler takes no more, and finishing twice is harmless", () => {
  const resampler = new Resampler(48000, OUT);
  resampler.process(new Float32Array(480));
  resampler.finish();
  assert.equal(resampler.finish().length, 0);
  assert.throws(() => resampler.process(new Float32Array(1)), /finished/);
});

test("sampling rates must be whole and positive", () => {
  assert.throws(() => new Resampler(0, OUT), /got sample rates 0 and 16000/);
  assert.throws(() => new Resampler(44100.5, OUT), RangeError);
});
