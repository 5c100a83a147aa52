"""Plans packs onto Ray workers, keeps the ledger, and is the front door (CLI)."""
