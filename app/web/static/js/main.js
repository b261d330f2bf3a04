// The pages' script begins here. What it changes, it changes through the API; what it shows, it reads
// from the server's own pages, so that there is one place that draws.

import { startDialogs } from "./dialogs.js";
import { $$ } from "./dom.js";
import { startNewAudit } from "./new_audit.js";
import { startLive } from "./progress.js";
import { Review } from "./review/review.js";

startDialogs();
startLive();
for (const form of $$("[data-new-audit]")) startNewAudit(form);
for (const select of $$("[data-submits] select")) select.addEventListener("change", () => select.form.submit());
for (const root of $$("[data-review]")) new Review(root);
