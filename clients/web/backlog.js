// Audio that the server may still need: packets not sent yet, packets that it has not confirmed, and packets whose
// text is not final. After a lost connection the session goes on from the first that is not confirmed; a server that
// knows nothing of the session hears again what has no final text. Either way it costs no words.

/** Milliseconds to wait before the given attempt (0 is the first): doubling, from half a second to eight. */
export function backoff(attempt) {
  return Math.min(8000, 500 * 2 ** attempt);
}

export class Backlog {
  #packets = []; // each {start, pcm}; start is the index of its first sample in the whole recording
  #sent = 0; // how many of them this connection has been given
  #end = 0; // index of the next sample
  #confirmed = 0; // the server has what lies before this sample
  #limit;
  #replay;

  /**
   * @param {number} limit samples that may wait at most
   * @param {number} replay samples that are sent and not confirmed at most, and confirmed ones that are kept at most
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

  /** @returns {Int16Array | null} the next packet to send, null when there is none or too much is not confirmed */
  next() {
    if (this.#sent === this.#packets.length) return null;
    const { start, pcm } = this.#packets[this.#sent];
    if (start - this.#confirmed >= this.#replay) return null;
    this.#sent += 1;
    return pcm;
  }

  /** The server has everything before the sample. */
  confirm(sample) {
    this.#confirmed = Math.max(this.#confirmed, sample);
    this.release(this.#confirmed - this.#replay);
  }

  /** Lets go of the packets that were sent and end at or before the sample. */
  release(sample) {
    while (this.#sent > 0 && this.#packets[0].start + this.#packets[0].pcm.length <= sample) {
      this.#packets.shift();
      this.#sent -= 1;
    }
  }

  /**
   * Begins to send again: from the sample on, or, for a server that has nothing, from the oldest packet.
   * @returns {number} the index of the first sample that will be sent
   */
  rewind(sample = null) {
    const oldest = this.#packets.length > 0 ? this.#packets[0].start : this.#end;
    const from = Math.max(sample ?? oldest, oldest);
    this.#confirmed = from;
    this.#sent = this.#packets.findIndex(({ start, pcm }) => start + pcm.length > from);
    if (this.#sent === -1) {
      this.#sent = this.#packets.length;
      return this.#end;
    }
    const { start, pcm } = this.#packets[this.#sent];
    if (start < from) {
      const cut = from - start;
      const halves = [{ start, pcm: pcm.subarray(0, cut) }, { start: from, pcm: pcm.subarray(cut) }];
      this.#packets.splice(this.#sent, 1, ...halves);
      this.#sent += 1;
    }
    return from;
  }
}
