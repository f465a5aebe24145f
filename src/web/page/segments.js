// From the states of one or both ends to the segments that must have passed between them. Nothing was captured: what is
// said here follows from the state machine (RFC 9293 section 3.10) and from nothing else.

/** What a step from one state to another says about segments: which came in, and which went out. */
function passed(from, to, cause) {
  switch (to) {
    case 'SYN_SENT': return { out: 'SYN' };
    case 'SYN_RECV': return { in: 'SYN', out: 'SYN+ACK' };
    case 'ESTABLISHED':
      if (from === 'SYN_SENT') return { in: 'SYN+ACK', out: 'ACK' };
      return from === 'SYN_RECV' ? { in: 'ACK' } : {};
    case 'FIN_WAIT1': case 'LAST_ACK': return { out: 'FIN' };
    case 'FIN_WAIT2': return { in: 'ACK of FIN' };
    case 'CLOSE_WAIT': case 'CLOSING': return { in: 'FIN', out: 'ACK of FIN' };
    case 'TIME_WAIT':
      if (from === 'CLOSING') return { in: 'ACK of FIN' };
      return { in: 'FIN', out: 'ACK of FIN' };
    case 'CLOSED': return cause === 'ack' ? { in: 'ACK of FIN' } : reset(cause);
    default: return {};
  }
}

/** What the cause alone says, whatever the way. */
function reset(cause) {
  if (cause === 'reset' || cause === 'refused') return { in: 'RST' };
  return cause === 'abort' ? { out: 'RST' } : {};
}

/** The states of one end, each with when and by whom it was seen; the first is where it began. */
export function states(life) {
  const first = { state: life.began, at: null, evidence: null, first: true };
  const steps = life.steps.map((step, i) => {
    const from = i ? life.steps[i - 1].to : life.began;
    return { state: step.to, from, at: step.at, evidence: step.evidence, cause: step.cause, via: step.via, segments: step.via ? reset(step.cause) : passed(from, step.to, step.cause) };
  });
  return [first, ...steps];
}

/**
 * The segments between two ends, each of which may be null: from which end and step, to which step, and what. A step of -1 is
 * one that is not known: of an end that is not ours, or that has not (or not yet) shown it.
 */
export function segments(ends) {
  const found = [];
  ends.forEach((end, from) => end?.forEach((step, i) => {
    if (step.segments?.out) found.push({ from, sent: i, got: -1, what: step.segments.out });
  }));
  ends.forEach((end, to) => end?.forEach((step, i) => {
    const what = step.segments?.in;
    if (!what) return;
    const match = found.find((segment) => segment.from !== to && segment.what === what && segment.got < 0);
    if (match) match.got = i;
    else found.push({ from: 1 - to, sent: -1, got: i, what });
  }));
  return found;
}

/** Whether a step was seen by anybody. */
export const observed = (step) => step.evidence !== 'inferred' && !step.via;

/**
 * How far down each step of each end is drawn: in the order of each end, what is sent before what comes of it, and, where both
 * were seen, in the order of their times.
 */
export function rows(ends, found, { gap, slope, open }) {
  const place = (timed) => {
    const y = ends.map((end) => (end ?? []).map((_, i) => (i ? gap : 0)));
    const push = (end, i, least) => {
      if (y[end][i] >= least) return false;
      y[end][i] = least;
      return true;
    };
    for (let pass = 0; pass < 40; pass++) {
      let moved = false;
      ends.forEach((end, e) => end?.forEach((step, i) => {
        if (i) moved = push(e, i, y[e][i - 1] + (end[i - 1].state === 'ESTABLISHED' ? open : i === 1 ? gap * 0.6 : gap)) || moved;
      }));
      for (const { from, sent, got } of found) {
        if (sent >= 0 && got >= 0) moved = push(1 - from, got, y[from][sent] + slope) || moved;
      }
      if (timed && ends[0] && ends[1]) {
        for (const [e, o] of [[0, 1], [1, 0]]) {
          ends[e].forEach((step, i) => ends[o].forEach((other, j) => {
            if (i && j && observed(step) && observed(other) && step.at - other.at > 2e-3) moved = push(e, i, y[o][j] + slope * 0.4) || moved;
          }));
        }
      }
      if (!moved) return y;
    }
    return null;
  };
  // Times that contradict the order of the segments (a step is seen some time after it was taken) are not drawn to.
  return place(true) ?? place(false) ?? ends.map((end) => (end ?? []).map((_, i) => i * gap));
}
