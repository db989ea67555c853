// One part of platformatic's job-queue at work, for tests/files/test_files_platformatic.py:
//   node platformatic.mjs PACKAGE produce BASE PREFIX COUNT
//   node platformatic.mjs PACKAGE consume BASE WORKER RECORD
//   node platformatic.mjs PACKAGE die BASE WORKER
import { appendFileSync } from 'node:fs'

const [, , folder, role, base, name, more] = process.argv
const { FileStorage, Queue } = await import(`${folder}/dist/index.js`)
const storage = new FileStorage({ basePath: base })

if (role === 'produce') {
  const queue = new Queue({ storage })
  await queue.start()
  for (let n = 0; n < Number(more); n++) await queue.enqueue(`${name}-${n}`, { n })
  await queue.stop()
  process.exit(0)
} else if (role === 'consume') {
  const queue = new Queue({ storage, workerId: name, blockTimeout: 1, concurrency: 2 })
  let last = Date.now()
  queue.execute(async job => {
    appendFileSync(more, `${job.id}\n`)
    last = Date.now()
    // A job without a result counts as failed.
    return job.id
  })
  await queue.start()
  setInterval(async () => {
    if (Date.now() - last < 1000) return
    last = Infinity
    await queue.stop()
    process.exit(0)
  }, 50)
} else if (role === 'die') {
  // Between the rename and the state file.
  await storage.connect()
  await storage.dequeue(name, 1)
  process.kill(process.pid, 'SIGKILL')
}
