// How numbers and times are written for people, as app/web/names.py writes them.

export const count = (number) => number.toLocaleString("en-US");
export const samples = (number) => `${count(number)} ${number === 1 ? "sample" : "samples"}`;

export function duration(seconds) {
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}
