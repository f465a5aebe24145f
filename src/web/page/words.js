// How numbers, times and facts are said.

/** The states in the order of a life, by name, with the label that the API uses. */
export const STATES = [
  ['CLOSED', 'close'], ['LISTEN', 'listen'], ['SYN_SENT', 'syn_sent'], ['SYN_RECV', 'syn_recv'],
  ['ESTABLISHED', 'established'], ['FIN_WAIT1', 'fin_wait1'], ['FIN_WAIT2', 'fin_wait2'], ['CLOSING', 'closing'],
  ['TIME_WAIT', 'time_wait'], ['CLOSE_WAIT', 'close_wait'], ['LAST_ACK', 'last_ack'],
];

export const LABEL = Object.fromEntries(STATES);

export const EVIDENCE = {
  tracepoint: 'the kernel’s own event',
  tcp_info: 'read from TCP_INFO on the own descriptor',
  sock_diag: 'read from the kernel’s socket table, by cookie',
  procfs: 'read from /proc/net/tcp, by addresses',
  inferred: 'nobody saw it: no other way leads there',
};

export const OUTCOMES = [
  'graceful', 'reset', 'aborted', 'refused', 'timeout', 'unreachable', 'no_local_port', 'idle', 'drained',
  'drain_aborted', 'mismatch', 'destroyed', 'cancelled', 'error',
];

const group = new Intl.NumberFormat('en-US');

/** 12,345 */
export const count = (n) => group.format(n);

/** 1, 9,999, 12.3k, 4.5M; where room is tight 1, 999, 9.9k, 12k, 4.5M. */
export function short(n, tight = false) {
  if (n < (tight ? 1000 : 10_000)) return group.format(n);
  if (n < 999_500) return `${(n / 1e3).toFixed(n < (tight ? 9_950 : 99_950) ? 1 : 0)}k`;
  return `${(n / 1e6).toFixed(1)}M`;
}

/** A duration in seconds, as exact as it is useful: 95 µs, 1.2 ms, 503 ms, 1.00 s, 2 min 5 s, 3 h 12 min. */
export function duration(seconds) {
  const t = Math.max(0, seconds);
  if (t === 0) return '0 s';
  if (t < 1e-3) return `${Math.max(1, Math.round(t * 1e6))} µs`;
  if (t < 0.1) return `${(t * 1e3).toFixed(1)} ms`;
  if (t < 0.9995) return `${Math.round(t * 1e3)} ms`;
  if (t < 9.995) return `${t.toFixed(2)} s`;
  if (t < 59.95) return `${t.toFixed(1)} s`;
  return age(t);
}

/** An age in whole seconds and more. */
export function age(seconds) {
  const t = Math.floor(Math.max(0, seconds));
  if (t < 60) return `${t} s`;
  if (t < 3600) return `${Math.floor(t / 60)} min ${t % 60} s`;
  if (t < 86_400) return `${Math.floor(t / 3600)} h ${Math.floor((t % 3600) / 60)} min`;
  return `${Math.floor(t / 86_400)} d ${Math.floor((t % 86_400) / 3600)} h`;
}

/** The time of day, in UTC as in the log. */
export function clock(unix, digits = 3) {
  return new Date(unix * 1000).toISOString().slice(11, digits ? 20 + digits : 19);
}

/** role outcome, as people say it. */
export const words = (label) => label.replaceAll('_', ' ');

/** One thing, or so many of them. */
export const things = (n, one, many) => `${count(n)} ${n === 1 ? one : many}`;
