// The page: wires the microphone, the session and the captions together.

import { keepAwake } from "./awake.js";
import { Capture, CaptureError } from "./capture.js";
import { Captions, clock, duration } from "./captions.js";
import { level } from "./packets.js";
import { Session } from "./session.js";

const byId = (id) => document.getElementById(id);
const captions = new Captions(byId("captions"), byId("log"), byId("live"));
const streamUrl = new URL("v1/stream", document.baseURI);
streamUrl.protocol = location.protocol === "https:" ? "wss:" : "ws:";

const DECODERS = {
  joint: "RNN-T and CTC",
  "rnnt-beam": "RNN-T beam",
  "ctc-beam": "CTC beam",
  rnnt: "RNN-T",
  ctc: "CTC",
};
const QUIET_SECONDS = 4; // of digital silence before we say so
const DELAYS_KEPT = 9;
const DOUBLE_MS = 500; // two presses within it are one, a double click
const PAUSED =
  "The browser has paused the microphone, as it does for a call, another program or a mute switch. What you say meanwhile is not heard. When that is over, press anywhere on this page, or any key, to go on.";

let state = "idle"; // idle starting connecting live paused reconnecting waiting finishing failed
let capture = null;
let session = null;
let clockStart = Infinity; // when the first sample was heard, in ms; the least late packet tells best
let paused = false; // the browser holds the microphone back
let said = ""; // the notice on show, unless the microphone is paused
let nextPress = 0; // the button does nothing before this time
let silentSince = null; // seconds recorded when digital silence began
let delays = [];
let asksForKey = false; // the server, for sessions
let farewell = ""; // why the recording ended, where it was not the person who ended it

// What the state is called, what the button does, and whether the choices may be changed.

const BUTTONS = {
  idle: "Start",
  failed: "Start",
  starting: "Cancel",
  connecting: "Stop",
  live: "Stop",
  paused: "Stop",
  reconnecting: "Stop",
  waiting: "Stop",
  finishing: "Skip the rest",
};

function show(next, text) {
  state = next;
  document.body.dataset.state = next;
  if (byId("status-text").textContent !== text) byId("status-text").textContent = text;
  // Stopped, but the server still owes text.
  byId("record-text").textContent = session?.stopping ? BUTTONS.finishing : BUTTONS[next];
  const free = next === "idle" || next === "failed";
  byId("chunks").disabled = !free;
  byId("decoders").disabled = !free;
  keepAwake(capture !== null);
  refreshActions();
}

function showLive() {
  if (paused) show("paused", "Microphone paused");
  else show("live", "Listening");
}

function notice(text) {
  said = text;
  const shown = paused ? PAUSED : text;
  if (byId("notice").textContent !== shown) byId("notice").textContent = shown;
  byId("notice").hidden = shown === "";
}

function refreshActions() {
  const running = state !== "idle" && state !== "failed";
  byId("empty").hidden = !captions.empty || running;
  byId("copy").disabled = byId("download").disabled = captions.text === "";
  byId("clear").disabled = captions.empty;
  byId("latest").hidden = captions.atEnd;
}

// The session tells; the page shows.

const listener = {
  state(name, detail) {
    switch (name) {
      case "connecting":
        show("connecting", detail.attempt === 0 ? "Connecting to the server" : "Connecting again");
        break;
      case "reconnecting":
        show("reconnecting", "Reconnecting");
        if (said === "") notice("The connection to the server was lost. What you say meanwhile is kept and captioned as soon as it is back.");
        break;
      case "live":
        notice("");
        showLive();
        break;
      case "finishing":
        notice("");
        show("finishing", "Finishing the last words");
        break;
      case "waiting": {
        const seconds = detail.delay / 1000;
        const why = detail.busy ? "Server busy" : "Server not reached";
        show("waiting", `${why}, trying again in ${seconds} s`);
        notice(
          detail.busy
            ? "The server has as many sessions as it can take. What you say is kept for up to a minute and captioned as soon as there is room."
            : `The server at ${streamUrl.host} does not answer${asksForKey ? ", or does not know this key" : ""}. What you say is kept for up to a minute and captioned as soon as it is back.`,
        );
        break;
      }
      case "ended":
        endRecording();
        notice(farewell);
        show("idle", "Ready");
        break;
      case "failed":
        endRecording();
        notice(detail.message);
        show("failed", "Stopped");
        break;
    }
  },

  ready(message, resumed) {
    if (!resumed) captions.forget(); // its audio is heard again
    showLanguage(message.bundle);
    fact("decoder-used", DECODERS[message.decoder] ?? message.decoder);
    fact("latency", `${Math.round(message.latency_ms)} ms`);
  },

  partial(message) {
    captions.partial(message);
    measure(message.end);
    refreshActions();
  },

  final(message) {
    captions.final(message);
    refreshActions();
  },
};

/** Fills one of the figures under the controls; an empty one is not shown. */
function fact(id, text) {
  byId(id).textContent = text;
  byId(id).parentElement.hidden = text === "";
}

function showLanguage(bundle) {
  let name = bundle;
  try {
    name = new Intl.DisplayNames(["en"], { type: "language" }).of(bundle);
    byId("log").lang = byId("live").lang = bundle;
  } catch {
    // a bundle may be called anything; then its name is all we know
  }
  fact("language", name);
}

/** Shows the median time from the end of the newest word to its appearance. */
function measure(end) {
  const delay = (performance.now() - clockStart) / 1000 - end;
  delays = [...delays, delay].slice(-DELAYS_KEPT);
  const median = delays.toSorted((a, b) => a - b)[Math.floor(delays.length / 2)];
  fact("delay", `${Math.max(0, median).toFixed(2)} s`);
}

// Recording.

/** The key in the page's own address, which browsers keep to themselves: /#key=... */
const apiKey = () => new URLSearchParams(location.hash.slice(1)).get("key");

async function start() {
  notice("");
  if (asksForKey && !/^[\w.~-]+$/.test(apiKey() ?? "")) {
    notice(
      "This server asks for an API key. Add #key= and your key (letters, digits and . _ ~ - only) to the address of this page, then press Start.",
    );
    show("failed", "No key");
    return;
  }
  farewell = "";
  delays = [];
  clockStart = Infinity;
  silentSince = null;
  fact("delay", "");
  show("starting", "Waiting for the microphone");
  let opened;
  try {
    opened = await Capture.open(microphone);
  } catch (error) {
    if (!(error instanceof CaptureError)) throw error;
    if (state !== "starting") return; // cancelled meanwhile
    notice(error.message);
    show("failed", "No microphone");
    return;
  }
  if (state !== "starting") {
    opened.abandon();
    return;
  }
  capture = opened;
  captions.divide();
  const options = { chunk_ms: Number(chosen("chunk")) };
  if (chosen("decoder") !== "") options.decoder = chosen("decoder");
  session = new Session(streamUrl.href, options, listener, apiKey());
}

async function stop() {
  const stopping = capture;
  capture = null;
  await stopping.stop();
  paused = false;
  sound(null);
  if (session === null) return; // it failed while the last packet was on its way
  nextPress = performance.now() + DOUBLE_MS; // to skip the rest is another wish
  session.finish();
  notice(said);
  if (state !== "finishing") show(state, byId("status-text").textContent);
}

function endRecording() {
  captions.settle();
  session = null;
  capture?.abandon();
  capture = null;
  paused = false;
  sound(null);
}

const microphone = {
  packet(packet) {
    if (session === null) return;
    session.send(packet);
    if (session === null) return; // it could take no more
    clockStart = Math.min(clockStart, performance.now() - session.recorded * 1000);
    byId("elapsed").textContent = clock(session.recorded);
    byId("elapsed").dateTime = duration(session.recorded);
    sound(level(packet));
  },

  paused(now) {
    if (capture === null) return;
    paused = now;
    clockStart = Infinity; // what was not heard does not count
    notice(said);
    sound(null);
    if (state === "live" || state === "paused") showLive();
  },

  silent() {
    leave("The browser paused the microphone for half a minute, so captioning stopped. The text so far is kept; press Start to go on.");
  },

  lost() {
    leave("The microphone was disconnected. The text so far is kept; connect it and press Start to go on.");
  },
};

/** Stops by itself, and says why. */
function leave(why) {
  if (capture === null) return;
  farewell = why;
  stop();
}

/** Draws the level: -60 dB is nothing, 0 dB is everything; null when the microphone is off. */
function sound(measured) {
  const share = measured === null ? 0 : Math.max(0, Math.min(1, 1 + measured.rms / 60));
  const loud = measured !== null && measured.peak > -0.1;
  byId("meter-fill").style.setProperty("--level", share.toFixed(3));
  byId("meter").classList.toggle("loud", loud);
  byId("meter").setAttribute("aria-valuenow", String(Math.round(100 * share)));
  let text = measured === null ? "Microphone off" : "Microphone on";
  if (paused) text = "Microphone paused";
  if (measured === null || measured.peak > -Infinity) {
    silentSince = null;
  } else {
    silentSince ??= session.recorded;
    if (session.recorded - silentSince > QUIET_SECONDS) text = "No sound at all: is the microphone muted?";
  }
  if (loud) text = "Too loud: move away or turn it down";
  if (byId("sound-text").textContent !== text) byId("sound-text").textContent = text;
}

// Controls.

byId("record").addEventListener("click", ({ timeStamp }) => {
  if (timeStamp < nextPress) return;
  nextPress = timeStamp + DOUBLE_MS;
  if (state === "idle" || state === "failed") start();
  else if (state === "starting") show("idle", "Ready");
  else if (capture !== null) stop();
  else if (session?.stopping) session.abort();
});

// Enter held down is one press.
byId("record").addEventListener("keydown", (event) => {
  if (event.repeat && event.key === "Enter") event.preventDefault();
});

for (const kind of ["visibilitychange", "click", "keydown"]) {
  document.addEventListener(kind, () => capture?.resume());
}

/** Says something in the status line for a moment. */
function flash(text) {
  const before = byId("status-text").textContent;
  byId("status-text").textContent = text;
  setTimeout(() => {
    if (byId("status-text").textContent === text) byId("status-text").textContent = before;
  }, 2000);
}

byId("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(captions.text);
    flash("Copied to the clipboard");
  } catch {
    notice("The browser did not allow copying. Select the text and copy it by hand, or use Download.");
  }
});

byId("download").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([captions.timed], { type: "text/plain;charset=utf-8" }));
  link.download = `captions-${new Date().toISOString().slice(0, 16).replaceAll(":", "")}.txt`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});

byId("clear").addEventListener("click", () => {
  captions.clear();
  refreshActions();
  byId("captions").focus();
});

byId("latest").addEventListener("click", () => {
  captions.toEnd();
  byId("captions").focus();
});

byId("captions").addEventListener("scroll", refreshActions);

// The choices are kept for the next visit.

const remembered = (key) => {
  try {
    return localStorage.getItem(key);
  } catch {
    return null; // storage may be switched off
  }
};
const remember = (key, value) => {
  try {
    localStorage.setItem(key, value);
  } catch {
    // then it is asked for anew next time
  }
};

const chosen = (name) => document.querySelector(`input[name=${name}]:checked`).value;

for (const input of document.querySelectorAll("input[type=radio]")) {
  if (input.value === remembered(input.name)) input.checked = true;
  input.addEventListener("change", () => remember(input.name, input.value));
}

// What the server is, before the first session.

async function greet() {
  try {
    const answer = await fetch("healthz");
    if (!answer.ok) return;
    const server = await answer.json();
    showLanguage(server.bundle);
    asksForKey = server.keys;
  } catch {
    // Start says it, with what to do
  }
}

refreshActions();
greet();
