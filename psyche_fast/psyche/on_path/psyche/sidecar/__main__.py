"""One further rank of a core of Psyche's."""

from psyche_fast.sidecar import main_for_psyche

if __name__ == "__main__":
    main_for_psyche()
