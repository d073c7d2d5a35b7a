// The transcript on the page: settled paragraphs, and one paragraph for what is being said now.

/** Seconds as m:ss, or h:mm:ss from an hour on. */
export function clock(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  const two = (n) => String(n).padStart(2, "0");
  const hours = Math.floor(whole / 3600);
  const minutes = Math.floor(whole / 60) % 60;
  return hours > 0 ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`;
}

/** Seconds as HTML's machine-readable duration. */
export function duration(seconds) {
  return `PT${seconds.toFixed(2)}S`;
}

function element(name, className, text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

function stamp(seconds) {
  const made = element("time", "stamp", clock(seconds));
  made.dateTime = duration(seconds);
  // The log announces each paragraph that is added; its time would be read out before every sentence.
  made.ariaHidden = "true";
  return made;
}

export class Captions {
  #scroller;
  #log;
  #live;
  #committed = element("span", "committed");
  #tentative = element("span", "tentative");
  #partial = null; // the message on show in the live paragraph
  #finals = [];

  /**
   * @param {HTMLElement} scroller the box that scrolls
   * @param {HTMLElement} log where finals go; an ARIA live region, so nothing else may
   * @param {HTMLElement} live the paragraph of the current partial
   */
  constructor(scroller, log, live) {
    this.#scroller = scroller;
    this.#log = log;
    this.#live = live;
  }

  /** The settled paragraphs, one a line. */
  get text() {
    return this.#finals.map((final) => final.text).join("\n");
  }

  /** The settled paragraphs with the time at which each began, one a line. */
  get timed() {
    return this.#finals.map((final) => `[${clock(final.start)}] ${final.text}\n`).join("");
  }

  get empty() {
    return this.#finals.length === 0 && this.#partial === null;
  }

  /** Whether the newest text is in view. */
  get atEnd() {
    const box = this.#scroller;
    return box.scrollHeight - box.scrollTop - box.clientHeight < 48;
  }

  partial(message) {
    this.#keepInView(() => {
      if (this.#partial === null) this.#live.replaceChildren(stamp(message.start), element("span", "text"));
      this.#partial = message;
      this.#committed.textContent = message.committed;
      this.#tentative.textContent = message.tentative;
      const gap = message.committed && message.tentative && !/\s$/.test(message.committed) ? " " : "";
      this.#live.lastChild.replaceChildren(this.#committed, gap, this.#tentative);
      this.#live.hidden = false;
    });
  }

  final(message) {
    this.#keepInView(() => {
      this.#clearLive();
      this.#finals.push(message);
      const paragraph = element("p", "final");
      paragraph.append(stamp(message.start), element("span", "text", message.text));
      this.#log.append(paragraph);
    });
  }

  /** Keeps what was heard when no final will come for it any more. */
  settle() {
    if (this.#partial === null) return;
    const { start, end } = this.#partial;
    const text = this.#live.lastChild.textContent;
    this.final({ start, end, text });
  }

  /** Takes back the current partial; its audio will be heard again. */
  forget() {
    this.#clearLive();
  }

  clear() {
    this.#clearLive();
    this.#finals = [];
    this.#log.replaceChildren();
  }

  /** A rule between two recordings on the same page. */
  divide() {
    if (this.#finals.length > 0) this.#log.append(element("hr", "divider"));
  }

  toEnd() {
    this.#scroller.scrollTop = this.#scroller.scrollHeight;
  }

  #clearLive() {
    this.#partial = null;
    this.#live.hidden = true;
    this.#live.replaceChildren();
  }

  #keepInView(change) {
    const follow = this.atEnd; // someone who scrolled up to read is left there
    change();
    if (follow) this.toEnd();
  }
}
