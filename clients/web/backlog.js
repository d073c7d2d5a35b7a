// Audio that the server may still need: packets not sent yet, and packets sent whose text is not final.
// After a lost connection the stream is replayed from here, so that a restart of the server costs no words.

/** Milliseconds to wait before the given attempt (0 is the first): doubling, from half a second to eight. */
export function backoff(attempt) {
  return Math.min(8000, 500 * 2 ** attempt);
}

export class Backlog {
  #packets = []; // each {start, pcm}; start is the index of its first sample in the whole recording
  #sent = 0; // how many of them this connection has been given
  #end = 0; // index of the next sample
  #limit;
  #replay;

  /**
   * @param {number} limit samples that may wait at most
   * @param {number} replay samples already sent that are kept at most
   */
  constructor(limit, replay) {
    this.#limit = limit;
    this.#replay = replay;
  }

  /** Samples that wait to be sent. */
  get waiting() {
    return this.#sent < this.#packets.length ? this.#end - this.#packets[this.#sent].start : 0;
  }

  /** Samples recorded so far. */
  get end() {
    return this.#end;
  }

  /**
   * @param {Int16Array} pcm
   * @returns {boolean} false when too much waits already; nothing is taken then
   */
  push(pcm) {
    if (this.waiting + pcm.length > this.#limit) return false;
    this.#packets.push({ start: this.#end, pcm });
    this.#end += pcm.length;
    return true;
  }

  /** @returns {Int16Array | null} the next packet to send, null when there is none */
  next() {
    if (this.#sent === this.#packets.length) return null;
    const { start, pcm } = this.#packets[this.#sent];
    this.#sent += 1;
    this.release(start + pcm.length - this.#replay);
    return pcm;
  }

  /** Lets go of the packets that were sent and end at or before the sample. */
  release(sample) {
    while (this.#sent > 0 && this.#packets[0].start + this.#packets[0].pcm.length <= sample) {
      this.#packets.shift();
      this.#sent -= 1;
    }
  }

  /** Begins to send again from the oldest packet. @returns {number} the index of its first sample */
  rewind() {
    this.#sent = 0;
    return this.#packets.length > 0 ? this.#packets[0].start : this.#end;
  }
}
