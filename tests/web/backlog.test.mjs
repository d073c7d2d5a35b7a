import assert from "node:assert/strict";
import test from "node:test";

import { Backlog, backoff } from "../../clients/web/backlog.js";

const packet = (value, length = 10) => new Int16Array(length).fill(value);

function drain(backlog) {
  const values = [];
  for (let next = backlog.next(); next !== null; next = backlog.next()) values.push(next[0]);
  return values;
}

test("waits double from half a second up to eight", () => {
  assert.deepEqual([0, 1, 2, 3, 4, 5, 50].map(backoff), [500, 1000, 2000, 4000, 8000, 8000, 8000]);
});

test("packets come out once, in order", () => {
  const backlog = new Backlog(100, 100);
  assert.ok(backlog.push(packet(1)) && backlog.push(packet(2)));
  assert.equal(backlog.waiting, 20);
  assert.deepEqual(drain(backlog), [1, 2]);
  assert.equal(backlog.waiting, 0);
  backlog.push(packet(3));
  assert.deepEqual(drain(backlog), [3]);
  assert.equal(backlog.end, 30);
});

test("a new connection hears again what has no final text", () => {
  const backlog = new Backlog(100, 100);
  for (const value of [1, 2, 3, 4]) backlog.push(packet(value));
  backlog.next();
  backlog.next();
  backlog.next();
  backlog.release(25); // the final ended inside the third packet: that one is still needed
  assert.equal(backlog.rewind(), 20);
  assert.deepEqual(drain(backlog), [3, 4]);
});

test("nothing is let go before it was sent", () => {
  const backlog = new Backlog(100, 100);
  backlog.push(packet(1));
  backlog.push(packet(2));
  backlog.next();
  backlog.release(1000);
  assert.equal(backlog.rewind(), 10);
  assert.deepEqual(drain(backlog), [2]);
});

test("after everything is settled a new connection begins at the end", () => {
  const backlog = new Backlog(100, 100);
  backlog.push(packet(1));
  backlog.next();
  backlog.release(10);
  assert.equal(backlog.rewind(), 10);
  assert.equal(backlog.next(), null);
});

test("audio that was not sent is never dropped: when too much waits, no more is taken", () => {
  const backlog = new Backlog(30, 100);
  for (const value of [1, 2, 3]) assert.ok(backlog.push(packet(value)));
  assert.equal(backlog.push(packet(4)), false);
  assert.equal(backlog.end, 30);
  backlog.next();
  assert.ok(backlog.push(packet(4)));
  assert.deepEqual(drain(backlog), [2, 3, 4]);
});

test("of the audio that the server has, only the newest is kept for another one", () => {
  const backlog = new Backlog(50, 20);
  for (let value = 1; value <= 8; value += 1) {
    backlog.push(packet(value));
    backlog.next();
    backlog.confirm(10 * value);
  }
  assert.equal(backlog.rewind(), 60);
  assert.equal(backlog.waiting, 20);
  assert.deepEqual(drain(backlog), [7, 8]);
});

test("what is not confirmed is kept, and no more than so much of it is sent", () => {
  const backlog = new Backlog(100, 20);
  for (const value of [1, 2, 3, 4]) backlog.push(packet(value));
  assert.deepEqual(drain(backlog), [1, 2]);
  backlog.confirm(5);
  assert.deepEqual(drain(backlog), [3]);
  backlog.confirm(30);
  assert.deepEqual(drain(backlog), [4]);
});

test("a session goes on at the sample that the server names, in the middle of a packet too", () => {
  const backlog = new Backlog(100, 100);
  backlog.push(Int16Array.from([1, 2, 3, 4]));
  backlog.push(Int16Array.from([5, 6, 7, 8]));
  drain(backlog);
  assert.equal(backlog.rewind(6), 6);
  assert.equal(backlog.waiting, 2);
  assert.deepEqual([...backlog.next()], [7, 8]);
  assert.equal(backlog.rewind(4), 4);
  assert.deepEqual(drain(backlog), [5, 7]);
  assert.equal(backlog.rewind(8), 8);
  assert.equal(backlog.next(), null);
  assert.equal(backlog.rewind(), 0);
  assert.deepEqual(drain(backlog), [1, 5, 7]);
});
