// Where the diagram's nodes and arrows are: RFC 9293 figure 5, with the arrows that Linux walks.

/** Column and row of each state; CLOSED is where a life begins, and once more where it ends. */
export const NODES = [
  { id: 'CLOSED', state: 'CLOSED', column: 1, row: 0 },
  { id: 'LISTEN', state: 'LISTEN', column: 1, row: 1 },
  { id: 'SYN_SENT', state: 'SYN_SENT', column: 2, row: 2 },
  { id: 'SYN_RECV', state: 'SYN_RECV', column: 0, row: 2 },
  { id: 'ESTABLISHED', state: 'ESTABLISHED', column: 1, row: 3 },
  { id: 'FIN_WAIT1', state: 'FIN_WAIT1', column: 0, row: 4 },
  { id: 'CLOSE_WAIT', state: 'CLOSE_WAIT', column: 2, row: 4 },
  { id: 'FIN_WAIT2', state: 'FIN_WAIT2', column: 0, row: 5 },
  { id: 'CLOSING', state: 'CLOSING', column: 1, row: 5 },
  { id: 'LAST_ACK', state: 'LAST_ACK', column: 2, row: 5 },
  { id: 'TIME_WAIT', state: 'TIME_WAIT', column: 1, row: 6 },
  { id: 'END', state: 'CLOSED', column: 2, row: 6 },
];

export const ROWS = 7;

/**
 * from, to, side and place where it leaves, side and place where it comes in, what is written at it and where: beside its
 * beginning (`b`), end (`e`) or middle (`m`), to the left or right of it or over it (`o`), so many lines of text below.
 * Places run from -1 to 1 along a side. `path` is whose textbook path it is on.
 */
export const ARROWS = [
  ['CLOSED', 'LISTEN', 'b', -0.25, 't', -0.25, ['listen(2)'], 'ml', 0, 'server'],
  ['LISTEN', 'CLOSED', 't', 0.25, 'b', 0.25, ['close(2)'], 'mr', 0],
  ['CLOSED', 'SYN_SENT', 'r', 0, 't', 0, ['connect(2)', 'SYN out'], 'er', -2.9, 'client'],
  ['LISTEN', 'SYN_RECV', 'l', 0, 't', 0, ['SYN in', 'SYN+ACK out'], 'el', -2.9, 'server'],
  ['SYN_SENT', 'SYN_RECV', 'l', 0, 'r', 0, ['SYN in: both at once'], 'mo', -0.8],
  ['SYN_SENT', 'ESTABLISHED', 'b', 0, 't', 0.6, ['SYN+ACK in', 'ACK out'], 'br', 1.4, 'client'],
  ['SYN_RECV', 'ESTABLISHED', 'b', 0.3, 't', -0.6, ['ACK in'], 'bl', 1.2, 'server'],
  ['SYN_RECV', 'FIN_WAIT1', 'b', -0.6, 't', -0.6, ['close', 'FIN out'], 'mr', 0],
  ['ESTABLISHED', 'FIN_WAIT1', 'b', -0.6, 't', 0.3, ['close', 'FIN out'], 'el', -1.5, 'client'],
  ['ESTABLISHED', 'CLOSE_WAIT', 'b', 0.6, 't', 0, ['FIN in', 'ACK out'], 'er', -1.5, 'server'],
  ['FIN_WAIT1', 'FIN_WAIT2', 'b', -0.3, 't', -0.3, ['ACK in'], 'mr', 0, 'client'],
  ['FIN_WAIT1', 'CLOSING', 'r', 0, 't', 0, ['FIN in', 'ACK out'], 'er', -3, null],
  ['FIN_WAIT2', 'TIME_WAIT', 'b', 0, 'l', 0, ['FIN in', 'ACK out'], 'bl', 1.6, 'client'],
  ['CLOSING', 'TIME_WAIT', 'b', 0, 't', 0, ['ACK in'], 'mr', 0],
  ['CLOSE_WAIT', 'LAST_ACK', 'b', 0, 't', 0, ['close', 'FIN out'], 'ml', 0, 'server'],
  ['LAST_ACK', 'END', 'b', 0, 't', 0, ['ACK in'], 'ml', 0, 'server'],
  ['TIME_WAIT', 'END', 'r', 0, 'l', 0, ['60 s'], 'mo', -0.8, 'client'],
];

/** Where a sudden end leaves: a reset, a timeout, an abort lead to CLOSED from anywhere. */
export const SUDDEN = [
  ['SYN_SENT', 't', 0.7], ['SYN_RECV', 't', -0.7], ['ESTABLISHED', 'r', 0], ['FIN_WAIT1', 'b', 0.6], ['FIN_WAIT2', 'r', 0],
  ['CLOSING', 'r', 0], ['CLOSE_WAIT', 'l', 0],
];

const OUT = { t: [0, -1], b: [0, 1], l: [-1, 0], r: [1, 0] };

/** Sizes for a drawing of this width, with text of this size. */
export function grid(width, em) {
  const node = Math.min(Math.max(width * 0.24, em * 6.6), em * 13);
  const tall = em * 3.9;
  const step = Math.max(em * 6.4, Math.min(width * 0.14, em * 7.8));
  const margin = Math.max(em * 0.4, Math.min(em * 3, (width - 3 * node) / 8));
  const columns = [margin + node / 2, width / 2, width - margin - node / 2];
  return { width, em, node, tall, step, columns, height: step * (ROWS - 1) + tall + em * 2, roomy: width > em * 40 };
}

/** Where a node is: its middle, and half of its sides, a little larger the more sockets are in it. */
export function place(grid, { column, row }, n = 0) {
  const grown = Math.min(1, Math.log10(1 + n) / 4.5);
  const room = Math.min(grid.em * 2.2, (grid.columns[1] - grid.columns[0] - grid.node) / 2.4);
  return {
    x: grid.columns[column],
    y: grid.em * 0.6 + grid.tall / 2 + row * grid.step,
    w: (grid.node + grown * Math.max(0, room)) / 2,
    h: (grid.tall + grown * grid.em * 1.3) / 2,
  };
}

function at({ x, y, w, h }, side, along) {
  const [dx, dy] = OUT[side];
  return [x + dx * w + (dx ? 0 : along * w * 0.9), y + dy * h + (dy ? 0 : along * h * 0.9)];
}

/** The path of an arrow between two places, as SVG writes it, and the middle of it. */
export function curve(from, out, along, to, into, end) {
  const [x1, y1] = at(from, out, along);
  const [x2, y2] = at(to, into, end);
  const reach = (side) => (side === 't' || side === 'b' ? Math.abs(y2 - y1) : Math.abs(x2 - x1)) * 0.55;
  const [[ox, oy], [ix, iy]] = [OUT[out], OUT[into]];
  const [c1x, c1y] = [x1 + ox * reach(out), y1 + oy * reach(out)];
  const [c2x, c2y] = [x2 + ix * reach(into), y2 + iy * reach(into)];
  const long = Math.hypot(x2 - x1, y2 - y1) || 1;
  const round = (n) => Math.round(n * 10) / 10;
  return {
    d: `M${[x1, y1].map(round)}C${[c1x, c1y, c2x, c2y, x2, y2].map(round)}`,
    normal: [(y2 - y1) / long, (x1 - x2) / long],
    point: (t) => {
      const u = 1 - t;
      const [a, b, c, d] = [u * u * u, 3 * u * u * t, 3 * u * t * t, t * t * t];
      return [a * x1 + b * c1x + c * c2x + d * x2, a * y1 + b * c1y + c * c2y + d * y2];
    },
  };
}

/** A short way out of a node that leads nowhere on the drawing. */
export function stub(grid, from, side, along) {
  const [x, y] = at(from, side, along);
  const [dx, dy] = OUT[side];
  const long = grid.em * 1.1;
  return { d: `M${x},${y}l${dx * long},${dy * long}`, end: [x + dx * (long + grid.em * 0.45), y + dy * (long + grid.em * 0.45)], normal: [dy, -dx], point: (t) => [x + dx * long * t, y + dy * long * t] };
}

/** A straight way between two nodes' edges, for what no arrow of the drawing is. */
export function straight(from, to) {
  const across = Math.abs(to.x - from.x) > Math.abs(to.y - from.y);
  const [out, into] = across ? (to.x > from.x ? ['r', 'l'] : ['l', 'r']) : to.y > from.y ? ['b', 't'] : ['t', 'b'];
  return curve(from, out, -0.85, to, into, -0.85);
}
