import fcntl
import json
import os
import struct

FIELDS = """magic format_version header_bytes file_bytes state num_sections created_unix_ns created_monotonic_ns
closed_unix_ns owner_pid rank world_size num_layers num_lanes last_fault num_faults uuid"""


class FormatReader:  # follows docs/recording-format.md alone: nothing of DODOCO, no numpy
    def __init__(self, path):
        self.fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        h = dict(zip(FIELDS.split(), self.unpack("<QIIQIIQQQIIIIIIQ16s", 0), strict=True))
        assert (h["magic"], h["format_version"]) == (0x0A0D4F434F444F44, 1)
        sections = [self.unpack("<IIQQQQ", 248 + 40 * i) for i in range(h["num_sections"])]
        self.places = {(kind, lane): (at, count) for kind, lane, at, _, count, _ in sections}
        self.strides = {(kind, lane): stride for kind, lane, _, _, _, stride in sections}
        self.metadata = json.loads(os.pread(self.fd, *reversed(self.places[1, 0])))
        (table, count), self.header, self.lanes = self.places[2, 0], h, range(h["num_lanes"])
        self.layers = [self.unpack("<IIQQQ", table + 32 * i) for i in range(count)]

    def unpack(self, form, at):
        return struct.unpack(form, os.pread(self.fd, struct.calcsize(form), at))

    def state(self):
        try:
            fcntl.flock(self.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(self.fd, fcntl.LOCK_UN)
        except BlockingIOError:
            return "closed" if self.unpack("<I", 24) == (2,) else "live"
        return "closed" if self.unpack("<I", 24) == (2,) else "dead"

    def board(self, layer):  # (words summed over the lanes, whether all of them are consistent)
        of_lanes = (self.block(lane, *self.layers[layer]) for lane in self.lanes)
        words, whole = zip(*of_lanes, strict=True)
        columns = enumerate(zip(*words, strict=True))
        return [max(column) if word == 8 else sum(column) for word, column in columns], all(whole)

    def block(self, lane, experts, _, offset, *__):
        form, at = f"<{16 + (experts + 7) // 8 * 8 + 1280}Q", self.places[3, lane][0] + offset
        for _ in range(100):
            passes, words, started = map(self.unpack, ("<Q", form, "<Q"), (at, at, at + 72))
            if passes == words[:1] == started and sum(words[16 : 16 + experts]) == words[2]:
                return words, True
        return words, False

    def ring(self, lane, n=0):  # ([(time, lane, values)], where to go on, how many were lost)
        (start, slots), records, lost = self.places[4, lane], [], 0
        while n < (head := self.unpack("<Q", start)[0]):
            n, lost = max(n, head - slots), lost + max(head - slots - n, 0)
            live, words = self.state() == "live", self.unpack("<32I", start + 128 + n % slots * 128)
            ahead = {(e - 1 - n // slots) % 0xFFFFFFFF if e else 2**31 for e in words[1::2]}
            if live and ahead != {0} and not any(0 < laps < 2**31 - 1 for laps in ahead):
                break
            records += [(words[8] | words[10] << 32, lane, words[::2])] * (ahead == {0})
            n, lost = n + 1, lost + (ahead != {0})
        return records, n, lost

    def routes(self):  # the ROUTE records of all lanes, by time
        records = [r for lane in self.lanes for r in self.ring(lane)[0] if r[2][0] & 255 == 1]
        return sorted(records, key=lambda record: record[0])

    def transfers(
        self,
    ):  # ([(lane, first slot's values, all counts)], slots that belong to none of them)
        found, stray = [], 0
        for lane in self.lanes:
            slots = [values for _, _, values in self.ring(lane)[0]]
            while slots:
                (first, *slots), more = slots, 0
                wanted = (first[0] >> 8 & 255) - 1
                while more < min(wanted, len(slots)) and slots[more][0] & 255 == 15:
                    more += 1
                if first[0] & 255 in (2, 3) and more == wanted:
                    found.append((lane, first, sum((s[1:] for s in slots[:more]), first[13:])))
                    slots = slots[more:]
                else:
                    stray += first[0] & 255 != 1
        return found, stray

    def traffic(self, layer, kind):  # the words of a block, summed over the lanes
        places = [self.places[8, lane][0] for lane in self.lanes]
        ranks, block = self.unpack("<Q", places[0])[0], 2 * layer + kind - 2
        words = 16 + (2 * ranks + 7) // 8 * 8
        of_lanes = [self.unpack(f"<{words}Q", at + 64 + 8 * words * block) for at in places]
        return [sum(column) for column in zip(*of_lanes, strict=True)]

    def placements(self, layer):  # of a layer's whole entries: (words 0 to 7, counts, slots)
        at, experts, found = self.places[5, 0][0], self.layers[layer][0], []
        (_, kept, size), block = self.unpack("<3Q", at), at + 64 + layer * self.strides[5, 0]
        head = self.unpack("<Q", block)[0]
        for n in range(max(head - kept, 0), head):
            words = self.unpack(f"<{size // 4}I", block + 64 + n % kept * size)
            values, end = words[::2], 8 + 2 * experts + words[12]
            if end <= size // 8 and set(words[1 : 2 * end : 2]) == {n // kept % (2**32 - 1) + 1}:
                low, high = values[8 : 8 + experts], values[8 + experts : 8 + 2 * experts]
                counts = [a | b << 32 for a, b in zip(low, high, strict=True)]
                found.append((values[:8], counts, list(values[8 + 2 * experts : end])))
        return found
