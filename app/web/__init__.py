"""The pages that a person looks at: audits, review of suspects, reports."""
