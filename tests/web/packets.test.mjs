import assert from "node:assert/strict";
import test from "node:test";

import { level, Packetizer, toInt16 } from "../../clients/web/packets.js";

test("samples are rounded to 16 bits and clipped", () => {
  assert.equal(toInt16(0), 0);
  assert.equal(toInt16(0.5), 16384);
  assert.equal(toInt16(1), 32767);
  assert.equal(toInt16(-1), -32768);
  assert.equal(toInt16(1.7), 32767);
  assert.equal(toInt16(-3), -32768);
  assert.equal(toInt16(0.6 / 32768), 1);
});

test("packets hold every sample once, in order, whatever the sizes that come in", () => {
  const samples = Float32Array.from({ length: 2000 }, (_, n) => n / 32768);
  for (const size of [1, 43, 128, 640, 1999]) {
    const packetizer = new Packetizer(640);
    const packets = [];
    for (let at = 0; at < samples.length; at += size) packets.push(...packetizer.push(samples.subarray(at, at + size)));
    packets.push(packetizer.finish());
    assert.deepEqual(packets.map((packet) => packet.length), [640, 640, 640, 80]);
    assert.deepEqual(packets.flatMap((packet) => [...packet]), Array.from({ length: 2000 }, (_, n) => n));
    assert.equal(packetizer.finish().length, 0);
  }
});

test("the level of a full-scale square, of half of it, and of silence", () => {
  const square = Int16Array.from({ length: 640 }, (_, n) => (n % 2 === 0 ? -32768 : 32767));
  assert.ok(Math.abs(level(square).rms) < 0.01);
  assert.ok(Math.abs(level(square).peak) < 0.01);
  assert.ok(Math.abs(level(square.map((sample) => sample / 2)).rms + 6.02) < 0.01);
  assert.equal(level(new Int16Array(640)).peak, -Infinity);
});
