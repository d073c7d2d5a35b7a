import assert from "node:assert/strict";
import test from "node:test";

import { LOOK_MS, Pulse } from "../../clients/web/pulse.js";

function watched() {
  const told = [];
  const pulse = new Pulse((paused) => told.push(paused), () => told.push("lost"));
  const look = (seconds) => {
    for (let ms = 0; ms < 1000 * seconds; ms += LOOK_MS) pulse.look();
  };
  return { pulse, told, look };
}

test("two seconds without a packet are a pause, which the next packet ends", () => {
  const { pulse, told, look } = watched();
  look(1.5);
  pulse.beat();
  look(1.5);
  assert.deepEqual(told, []);
  look(0.5);
  look(10);
  assert.deepEqual(told, [true]);
  pulse.beat();
  pulse.beat();
  assert.deepEqual(told, [true, false]);
});

test("a browser that holds the microphone back is believed at once, whatever packets say", () => {
  const { pulse, told, look } = watched();
  pulse.hold(true);
  assert.deepEqual(told, [true]);
  for (let second = 0; second < 60; second += 1) {
    pulse.hold(true);
    look(1);
    pulse.beat(); // silence
  }
  assert.deepEqual(told, [true]);
  pulse.hold(false);
  assert.deepEqual(told, [true, false]);
});

test("a context that runs again without packets is still paused", () => {
  const { pulse, told, look } = watched();
  pulse.hold(true);
  look(3);
  pulse.hold(false);
  assert.deepEqual(told, [true]);
  pulse.beat();
  assert.deepEqual(told, [true, false]);
});

test("half a minute without a packet is the end, told once", () => {
  const { told, look } = watched();
  look(29.5);
  assert.deepEqual(told, [true]);
  look(60);
  assert.deepEqual(told, [true, "lost"]);
});
